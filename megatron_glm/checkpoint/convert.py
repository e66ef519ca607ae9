"""From one checkpoint format to another, a tensor at a time, through the table."""

import concurrent.futures
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_glm.checkpoint.errors import CheckpointError, CorruptFileError
from megatron_glm.checkpoint.quantization import QuantizedWeight, quantize
from megatron_glm.checkpoint.record import digest, recorded_hashes
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors
from megatron_glm.checkpoint.torch_file import BLOCK_BYTES

# Blocks read, converted and written, temporaries of quantisation, and what of them the C library
# keeps for the next ones.
WORKING_BYTES = 32 * BLOCK_BYTES


class Source(Protocol):
    """An opened checkpoint of any format.

    dtype: of its plain weights. bits: of its quantised linear weights, None where there are none;
    scales: scales a row of these, by Megatron's pattern. read: may put what it returns into
    `memory`, uint8 [bytes].
    """

    directory: Path
    iteration: int
    settings: Settings
    dtype: torch.dtype
    bits: int | None
    scales: dict[str, int]

    def read(
        self, tensor: Tensor, memory: torch.Tensor | None = None
    ) -> torch.Tensor | QuantizedWeight: ...


@dataclass
class Conversion:
    """How each tensor of a source is changed on its way, and what was seen of it.

    dtype: of the result's plain weights. bits, scales: as in `Source`, of the result. progress:
    called with the bytes of each tensor read.
    Calling it, in the order of `tensors`, reads, checks and converts one tensor, which is good
    until the next call. Its hash is taken while the caller writes it and reads the next one:
    matrices take turns in two memories, which cost less time than fresh ones.
    """

    source: Source
    dtype: torch.dtype
    bits: int | None = None
    scales: dict[str, int] = field(default_factory=dict)
    progress: Callable[[int], Any] = lambda num_bytes: None
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        self._expected = recorded_hashes(self.source.directory, self.source.iteration)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        matrices = [t for t in tensors(self.source.settings.dimensions) if len(t.row.shape) == 2]
        self._turns = (matrices[0::2], matrices[1::2])
        # Pages that are never touched take no memory.
        self._memories = [
            torch.empty(max(map(self.source_bytes, turn)), dtype=torch.uint8)
            for turn in self._turns
        ]
        self._turn = 1
        self._hashing: tuple[list[concurrent.futures.Future], ...] = ([], [])

    def __call__(self, tensor: Tensor) -> torch.Tensor | QuantizedWeight:
        memory = None
        if len(tensor.row.shape) == 2:
            self._turn = 1 - self._turn
            self._await_hashes(self._turn)
            memory = self._memories[self._turn]
        value = self.source.read(tensor, memory)
        name = tensor.name(Format.MEGATRON)
        entry = self.hashes[name] = {}
        if self._is_kept(value, tensor):
            hashing = self._thread.submit(self._hash_both, name, value, entry)
        else:
            entry["source"] = self._checked(name, digest(value))
            value = self._convert(name, value, tensor)
            hashing = self._thread.submit(self._hash_target, value, entry)
        self._hashing[self._turn].append(hashing)
        self.progress(self.source_bytes(tensor))
        return value

    def finish(self) -> None:
        """Waits for the last hashes; CorruptFileError if one is not the recorded one."""
        for turn in (1 - self._turn, self._turn):
            self._await_hashes(turn)

    def _await_hashes(self, turn: int) -> None:
        for hashing in self._hashing[turn]:
            hashing.result()
        self._hashing[turn].clear()

    def source_bytes(self, tensor: Tensor) -> int:
        """Memory that a tensor takes as the source gives it."""
        count = torch.Size(tensor.shape(self.source.settings.dimensions)).numel()
        quantized = self.source.bits and tensor.row.quantizable
        return count if quantized else count * self.source.dtype.itemsize

    def peak_bytes(self) -> int:
        """The most memory that the tensors in hand take, beside WORKING_BYTES."""
        return sum(
            max(map(self.source_bytes, turn)) + max(map(self._converted_bytes, turn))
            for turn in self._turns
        )

    def _converted_bytes(self, tensor: Tensor) -> int:
        """Memory that a tensor takes beside the one that it was read into."""
        count = torch.Size(tensor.shape(self.source.settings.dimensions)).numel()
        if self.source.bits and tensor.row.quantizable:
            # Packed codes are there while they are unpacked.
            return count if self.bits else count * self.dtype.itemsize
        if self.bits and tensor.row.quantizable:
            return count
        grows = self.dtype.itemsize > self.source.dtype.itemsize
        return count * self.dtype.itemsize if grows else 0

    def _is_kept(self, value: torch.Tensor | QuantizedWeight, tensor: Tensor) -> bool:
        if isinstance(value, QuantizedWeight):
            return self.bits is not None
        return value.dtype == self.dtype and not (self.bits and tensor.row.quantizable)

    def _convert(
        self, name: str, value: torch.Tensor | QuantizedWeight, tensor: Tensor
    ) -> torch.Tensor | QuantizedWeight:
        if isinstance(value, QuantizedWeight):
            return value.dequantize(self.dtype)
        if self.bits and tensor.row.quantizable:
            try:
                return quantize(value, self.bits, self.scales[tensor.row.megatron])
            except ValueError as error:
                raise CheckpointError(f"{self.source.directory}: {name}: {error}") from None
        return self._cast(name, value)

    def _cast(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Another type; into the same memory where it is not larger."""
        if self.dtype.itemsize > value.dtype.itemsize:
            result = torch.empty(value.shape, dtype=self.dtype)
        else:
            memory = value.reshape(-1).view(self.dtype)[: value.numel()]
            result = memory.view(value.shape)
        elements = BLOCK_BYTES // 4
        for source, target in zip(
            value.reshape(-1).split(elements), result.reshape(-1).split(elements), strict=True
        ):
            block = source.to(self.dtype)
            if not block.isfinite().all() and source.isfinite().all():
                raise CheckpointError(
                    f"{name}: holds {source.abs().max().item():g}, beyond the largest "
                    f"{self.dtype}; give --dtype bf16 or fp32"
                )
            target.copy_(block)
        return result

    def _hash_both(self, name: str, value: torch.Tensor | QuantizedWeight, entry: dict) -> None:
        entry["source"] = entry["target"] = self._checked(name, digest(value))

    def _hash_target(self, value: torch.Tensor | QuantizedWeight, entry: dict) -> None:
        entry["target"] = digest(value)

    def _checked(self, name: str, found: str) -> str:
        if self._expected.get(name, found) != found:
            raise CorruptFileError(
                f"{self.source.directory}: {name} is not what conversion.json recorded (sha256 "
                f"{found[:12]}..., recorded {self._expected[name][:12]}...): a file was damaged or "
                "exchanged; fetch it again, or remove conversion.json if the change was meant"
            )
        return found


def resident_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's, this does not start from what the parent process held.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
