"""The residual connection as a value: summed up where it is needed, in the kernel that needs it.

Megatron computes alpha * residual + dropout(x + bias) in one slot of the layer and normalises it
in the next. Where kernels run, the first slot only says what to add up, and the norm reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron.core.fusions import fused_bias_dropout
from torch import Tensor

from megatron_glm.model.dropout import Dropout, draw_dropout


class ScaledResidual(NamedTuple):
    """alpha * tensor, not multiplied yet."""

    tensor: Tensor
    alpha: float


@dataclass(frozen=True)
class Sum:
    """alpha * residual + dropout(x + bias), not added up yet."""

    # Not a tuple: Megatron takes one for the two results of a norm.
    x: Tensor
    """Output of a linear, [..., h] in fp32, bf16 or fp16."""
    bias: Tensor
    """Its bias, [h]."""
    residual: Tensor
    """As x."""
    alpha: float
    dropout: Dropout | None


def get_bias_dropout_sum(training: bool, fused: bool) -> Callable[..., Tensor | Sum]:
    """For the slot before a norm: a Sum where the residual is scaled yet to be, else Megatron's.

    Arguments and those of the function that is returned are `get_bias_dropout_add`'s.
    """

    def bias_dropout_sum(x_with_bias, residual, probability):
        if not isinstance(residual, ScaledResidual):
            stock = fused_bias_dropout.get_bias_dropout_add(training, fused)
            return stock(x_with_bias, residual, probability)
        x, bias = x_with_bias
        # From the generator that Megatron's own dropout would use: ranks that share these hidden
        # states drop the same, and a recomputation what the first pass dropped.
        dropout = draw_dropout(probability if training else 0.0, x.device)
        return Sum(x, bias, residual.tensor, residual.alpha, dropout)

    return bias_dropout_sum


def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """For the slot at the end of a layer, whose result goes to other layers and ranks: a tensor."""
    bias_dropout_sum = get_bias_dropout_sum(training, fused)

    def bias_dropout_add(x_with_bias, residual, probability):
        added = bias_dropout_sum(x_with_bias, residual, probability)
        if not isinstance(added, Sum):
            return added
        from megatron_glm.model.fused.residual_norm import residual_sum

        return residual_sum(added)

    return bias_dropout_add
