"""Writes SAT checkpoints: a file a tensor-parallel rank, all at once, a tensor at a time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_glm.checkpoint.errors import ShapeError
from megatron_glm.checkpoint.quantization import QuantizedWeight, pack_int4
from megatron_glm.checkpoint.sat import MAX_TP, SCALE, file_name, inverse_frequencies
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import (
    Dimensions,
    Format,
    Tensor,
    check_tensor_parallel_size,
    parts,
    shard_shape,
    tensors,
)
from megatron_glm.checkpoint.torch_file import row_blocks
from megatron_glm.checkpoint.torch_writer import TensorSpec, TorchWriter

Read = Callable[[Tensor], torch.Tensor | QuantizedWeight]


class SATWriter:
    """A SAT checkpoint to be: `bits` is 8 or 4 for quantised linear weights, None for none."""

    def __init__(self, settings: Settings, tp_size: int, dtype: torch.dtype, bits: int | None):
        if not 1 <= tp_size <= MAX_TP:
            raise ShapeError(f"--target-tp {tp_size}: SAT checkpoints have 1 to {MAX_TP} shards")
        check_tensor_parallel_size(settings.dimensions, tp_size)
        self.dimensions: Dimensions = settings.dimensions
        self.tp_size, self.bits = tp_size, bits
        self._specs = self._shard_specs(dtype)

    @property
    def num_bytes(self) -> int:
        """Size of the result, without a few kB a file."""
        return self.tp_size * sum(spec.num_bytes for spec in self._specs.values())

    def write(self, folder: Path, iteration: int, read: Read) -> None:
        """Writes `latest` and the shards into a folder; `read` is called once a tensor, in the
        order of `tensors`."""
        (folder / "latest").write_text(str(iteration))
        shards = folder / str(iteration)
        shards.mkdir()
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(TorchWriter(shards / file_name(rank), self._specs))
                for rank in range(self.tp_size)
            ]
            for tensor in tensors(self.dimensions):
                value = read(tensor)
                for rank, file in enumerate(files):
                    self._write_part(file, tensor, value, rank)
                del value
            frequencies = inverse_frequencies(self.dimensions)
            for name in self._frequency_names():
                for file in files:
                    file.write(name, [frequencies])

    def _write_part(
        self, file: TorchWriter, tensor: Tensor, value: torch.Tensor | QuantizedWeight, rank: int
    ) -> None:
        name = tensor.name(Format.SAT)
        if isinstance(value, QuantizedWeight):
            codes = self._parts(tensor, value.codes, rank)
            file.write(name, self._packed(codes))
            scales = (
                [value.scales[:, rank]]
                if tensor.row.split == 1
                else [part[:, 0] for part in self._parts(tensor, value.scales, rank)]
            )
            file.write(name + SCALE, scales)
        else:
            file.write(name, self._parts(tensor, value, rank))

    def _packed(self, codes: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for part in codes:
            for block in row_blocks(part):
                yield pack_int4(block) if self.bits == 4 else block

    def _parts(self, tensor: Tensor, whole: torch.Tensor, rank: int) -> list[torch.Tensor]:
        return parts(tensor.row, whole, Format.SAT, rank, self.tp_size)

    def _frequency_names(self) -> list[str]:
        return [
            f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"
            for layer in range(self.dimensions.num_layers)
        ]

    def _shard_specs(self, dtype: torch.dtype) -> dict[str, TensorSpec]:
        specs = {}
        for tensor in tensors(self.dimensions):
            name = tensor.name(Format.SAT)
            shape = shard_shape(tensor, self.dimensions, self.tp_size)
            if self.bits and tensor.row.quantizable:
                specs[name] = TensorSpec(torch.int8, (shape[0], shape[1] * self.bits // 8))
                specs[name + SCALE] = TensorSpec(torch.float16, shape[:1])
            else:
                specs[name] = TensorSpec(dtype, shape)
        frequencies = inverse_frequencies(self.dimensions)
        for name in self._frequency_names():
            specs[name] = TensorSpec(frequencies.dtype, tuple(frequencies.shape))
        return specs
