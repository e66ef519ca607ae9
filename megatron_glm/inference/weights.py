"""A checkpoint's weights as one rank of an inference layout needs them."""

import torch

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.quantization import QuantizedWeight, quantize
from megatron_glm.checkpoint.table import Format, check_tensor_parallel_size, find, shard
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.linear import Linear, PlainLinear, quantized_linear


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
        name = f"{name}.weight"
        weight = self._read(name)
        if self.bits and not isinstance(weight, QuantizedWeight):
            weight = self._quantize(name, weight)
        if isinstance(weight, QuantizedWeight):
            return quantized_linear(
                self._shard_quantized(name, weight), bias, self.dtype, self.device
            )
        return PlainLinear(self._place(self._shard(name, weight)), bias)

    def _read(self, name: str) -> torch.Tensor | QuantizedWeight:
        return self.source.read(find(Format.MEGATRON, name))

    def _quantize(self, name: str, weight: torch.Tensor) -> QuantizedWeight:
        # Before it is cut, so that the result does not depend on the layout.
        try:
            return quantize(weight, self.bits)
        except ValueError as error:
            raise CheckpointError(f"{self.source.directory}: {name}: {error}") from None

    def _shard(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return shard(name, whole, self.layout.tp_rank, self.layout.tp_size)

    def _shard_quantized(self, name: str, whole: QuantizedWeight) -> QuantizedWeight:
        codes = self._shard(name, whole.codes)
        if find(Format.MEGATRON, name).row.split == 0:
            return QuantizedWeight(codes, self._shard(name, whole.scales), whole.bits)
        groups, tp_rank, tp_size = whole.scales.shape[1], self.layout.tp_rank, self.layout.tp_size
        if groups % tp_size and tp_size % groups:
            raise CheckpointError(
                f"--tensor-model-parallel-size {tp_size}: {name} has {groups} scales a row, which "
                f"{tp_size} ranks cannot share; give a divisor or a multiple of {groups}"
            )
        first = tp_rank * groups // tp_size
        scales = whole.scales[:, first : first + max(groups // tp_size, 1)]
        return QuantizedWeight(codes, scales, whole.bits)

    def _place(self, part: torch.Tensor) -> torch.Tensor:
        return part.to(self.device, self.dtype).contiguous()
