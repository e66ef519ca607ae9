"""From one checkpoint format to another, a tensor at a time, through the table."""

import re
import resource
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megatron_glm.checkpoint.errors import CheckpointError, CorruptFileError
from megatron_glm.checkpoint.quantization import QuantizedWeight, quantize
from megatron_glm.checkpoint.record import digest, recorded_hashes
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors
from megatron_glm.checkpoint.torch_file import BLOCK_BYTES

# Blocks read, converted and written, temporaries of quantisation, and what of them the C library
# keeps for the next ones.
WORKING_BYTES = 48 * BLOCK_BYTES


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


class _Ahead(NamedTuple):
    """A tensor that is read ahead, and which of the two memories it or its neighbour takes."""

    tensor: Tensor
    turn: int
    reading: Future


@dataclass
class Conversion:
    """How each tensor of a source is changed on its way, and what was seen of it.

    dtype: of the result's plain weights. bits, scales: as in `Source`, of the result. progress:
    called with the bytes of each tensor read.
    Calling it, once for each of `tensors` in their order, gives a tensor read, checked and
    converted, which is good until the next call. While the caller writes it, one thread takes its
    hash and another reads the next one: matrices take turns in two memories.
    """

    source: Source
    dtype: torch.dtype
    bits: int | None = None
    scales: dict[str, int] = field(default_factory=dict)
    progress: Callable[[int], Any] = lambda num_bytes: None
    hashes: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        self._expected = recorded_hashes(self.source.directory, self.source.iteration)
        everything = list(tensors(self.source.settings.dimensions))
        matrices = [tensor for tensor in everything if _is_matrix(tensor)]
        self._turns = (matrices[0::2], matrices[1::2])
        # Fresh memory for each would cost as much time as its hash. These take none before they
        # are touched.
        self._memories = [
            torch.empty(max(map(self.source_bytes, turn)), dtype=torch.uint8)
            for turn in self._turns
        ]
        self._unread, self._turn = iter(everything), 1
        self._ahead: deque[_Ahead] = deque()
        self._hashing: list[list[Future]] = [[], []]
        self._reader, self._hasher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def __call__(self, tensor: Tensor) -> torch.Tensor | QuantizedWeight:
        if not self._ahead:
            self._read_ahead()
        ahead = self._ahead.popleft()
        if ahead.tensor != tensor:
            raise ValueError(f"{tensor} asked for where {ahead.tensor} is due")
        value, source_hash = ahead.reading.result()
        entry = self.hashes[tensor.name(Format.MEGATRON)] = {}
        if source_hash is not None:
            entry["source"] = source_hash
        hashing = self._hasher.submit(self._hash, tensor, value, entry)
        self._hashing[ahead.turn].append(hashing)
        if _is_matrix(tensor):
            self._read_ahead()
        self.progress(self.source_bytes(tensor))
        return value

    def finish(self) -> None:
        """Waits for the last hashes; CorruptFileError if one is not the recorded one."""
        for turn in (1 - self._turn, self._turn):
            _wait(self._hashing[turn])

    def _read_ahead(self) -> None:
        """Starts reading up to the next matrix, into the memory of the one before last. That one
        was written, and its hash is awaited."""
        for tensor in self._unread:
            memory, before = None, []
            if _is_matrix(tensor):
                self._turn = 1 - self._turn
                memory, before = self._memories[self._turn], self._hashing[self._turn]
                self._hashing[self._turn] = []
            reading = self._reader.submit(self._read, tensor, memory, before)
            self._ahead.append(_Ahead(tensor, self._turn, reading))
            if memory is not None:
                break

    def _read(
        self, tensor: Tensor, memory: torch.Tensor | None, before: list[Future]
    ) -> tuple[torch.Tensor | QuantizedWeight, str | None]:
        """A tensor as it is to be written, and its hash as it was read, None where nothing
        changes."""
        _wait(before)
        value = self.source.read(tensor, memory)
        if self._is_kept(value, tensor):
            return value, None
        name = tensor.name(Format.MEGATRON)
        found = self._checked(name, digest(value))
        # May change the type in place.
        return self._convert(name, value, tensor), found

    def _hash(
        self, tensor: Tensor, value: torch.Tensor | QuantizedWeight, entry: dict[str, str]
    ) -> None:
        found = digest(value)
        if "source" not in entry:
            entry["source"] = self._checked(tensor.name(Format.MEGATRON), found)
        entry["target"] = found

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

    def _checked(self, name: str, found: str) -> str:
        if self._expected.get(name, found) != found:
            raise CorruptFileError(
                f"{self.source.directory}: {name} is not what conversion.json recorded (sha256 "
                f"{found[:12]}..., recorded {self._expected[name][:12]}...): a file was damaged or "
                "exchanged; fetch it again, or remove conversion.json if the change was meant"
            )
        return found


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.row.shape) == 2


def _wait(futures: list[Future]) -> None:
    for future in futures:
        future.result()


def resident_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's, this does not start from what the parent process held.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
