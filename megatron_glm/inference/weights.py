"""A checkpoint's weights as one rank of an inference layout needs them."""

from dataclasses import replace

import torch

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.quantization import QuantizedWeight, quantize
from megatron_glm.checkpoint.table import Format, check_tensor_parallel_size, find, shard
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.linear import Linear, PlainLinear


class Weights:
    """Reads weights by Megatron name: this rank's part, in its type and on its device.

    dtype: of everything that is not quantised, and of the arithmetic. bits: 8 or 4 to quantise the
    linear weights of the layers, None to take them as they are stored.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        device: torch.device,
        dtype: torch.dtype,
        bits: int | None = None,
    ):
        check_tensor_parallel_size(source.settings.dimensions, layout.tp_size)
        if bits and source.bits not in (None, bits):
            raise CheckpointError(
                f"--quantization-bit-width {bits}: {source.directory} holds INT{source.bits} "
                "weights already; drop the flag or load the fp16 checkpoint"
            )
        self.source, self.layout, self.device, self.dtype = source, layout, device, dtype
        self.bits = bits

    def __call__(self, name: str) -> torch.Tensor:
        """A plain tensor."""
        return self._place(self._shard(name, self._read(name)))

    def linear(self, name: str, with_bias: bool = True) -> Linear:
        """The linear layer with weight `name`.weight and, on request, its bias."""
        bias = self(f"{name}.bias") if with_bias else None
        weight = self._read(f"{name}.weight")
        return PlainLinear(self._place(self._shard(f"{name}.weight", weight)), bias)

    def _read(self, name: str) -> torch.Tensor | QuantizedWeight:
        return self.source.read(find(Format.MEGATRON, name))

    def _shard(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return shard(name, whole, self.layout.tp_rank, self.layout.tp_size)

    def _place(self, part: torch.Tensor) -> torch.Tensor:
        return part.to(self.device, self.dtype).contiguous()
