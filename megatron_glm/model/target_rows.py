"""Logits of the targets alone: the rows of a micro-batch whose logits the loss needs.

Of a GLM's tokens about half are targets, so half of the last product, of its gradients and of the
cross entropy would be multiplied by zero in the end.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NUM_SIZES = 16
"""A micro-batch has one of so many numbers of rows: few enough for an allocator that keeps blocks
of each size and for kernels chosen by shape, at 3% of the rows on average."""


def num_rows(num_targets: int, num_tokens: int) -> int:
    """Rows to compute for `num_targets` of the `num_tokens` tokens of a micro-batch, at least 1."""
    step = -(-num_tokens // NUM_SIZES)
    return min(num_tokens, max(1, -(-num_targets // step)) * step)


def rows_of_targets(loss_mask: Tensor, size: int) -> Tensor:
    """Rows, [size] int64, of hidden states [s * b, h] in which all targets are; each row once.

    loss_mask: [b, s], 0 or 1. size: at least the number of targets; filled up with other rows.
    """
    return loss_mask.t().flatten().argsort(descending=True, stable=True)[:size]


def select_rows(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], [n, h], of [m, h]. rows: [n] int64, none of them twice.

    Its gradient is a copy, where that of indexing adds atomically or sorts.
    """
    return _SelectRows.apply(values, rows)


def spread_rows(values: Tensor, rows: Tensor, size: int) -> Tensor:
    """The inverse of selecting: [size] with values [n] in `rows` and zeros elsewhere."""
    return values.new_zeros(size).scatter(0, rows, values)


class _SelectRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, rows):
        ctx.save_for_backward(rows)
        ctx.size = len(values)
        return values.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, rows, grad), None
