"""Prefix attention from torch's fused CPU kernel on split ranges: no s x s tensor.

Of a sample, all queries see the context (a rectangle) and the later queries see the later tokens
causally (a triangle): two calls of a kernel that returns the log-sum-exp of its scores. The rows
in both are merged by these, and the kernel's own backward, given the merged output and
log-sum-exp, is the exact backward of each part, as in ring attention (arXiv 2310.01889).

Cutting rows from a causal call over the whole sample instead needs no merge and costs 1.1 to 2.0
times as much (benchmarks/LOG.md), since the kernel's triangle starts at the first query.
"""

import torch
from torch import Tensor

from megatron_glm.model.attention import chunked
from megatron_glm.model.attention.bounds import sample_ranges

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` by the CPU's fused kernel.

    With dropout, which the kernel lacks, the queries go in chunks through `chunked.attention`.
    """
    if dropout is not None:
        return chunked.attention(
            query, key, value, samples, softmax_scale=softmax_scale, dropout=dropout
        )
    return _SplitRanges.apply(query, key, value, samples, softmax_scale)


class _SplitRanges(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, samples, softmax_scale):
        # [s, b, n, d] -> [b, n, s, d] as the kernel wants it; strides are free, only d is dense.
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        o = out.permute(1, 2, 0, 3)
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        ranges = sample_ranges(samples)
        for b, start, middle, end in _flatten(ranges):
            every, first, later = slice(start, end), slice(start, middle), slice(middle, end)
            if middle > start:
                o[b, :, every], lse[b, :, every] = _forward(
                    q[b, :, every], k[b, :, first], v[b, :, first], scale=softmax_scale
                )
            if end > middle:
                triangle = _forward(
                    q[b, :, later], k[b, :, later], v[b, :, later],
                    is_causal=True, scale=softmax_scale,
                )
                if middle > start:
                    triangle = _merge((o[b, :, later], lse[b, :, later]), triangle)
                o[b, :, later], lse[b, :, later] = triangle
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.ranges, ctx.softmax_scale = ranges, softmax_scale
        seq_length, batch, heads, dim = out.shape
        return out.view(seq_length, batch, heads * dim)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format)
                 for x in (query, key, value)]
        q, k, v, o, do, dq, dk, dv = (
            x.permute(1, 2, 0, 3)
            for x in (query, key, value, out, grad_out.reshape(out.shape), *grads)
        )

        def add(b, queries, keys, is_causal):
            gq, gk, gv = _backward(
                do[b, :, queries], q[b, :, queries], k[b, :, keys], v[b, :, keys],
                o[b, :, queries], lse[b, :, queries], 0.0, is_causal, scale=ctx.softmax_scale,
            )
            dq[b, :, queries] += gq
            dk[b, :, keys] += gk
            dv[b, :, keys] += gv

        for b, start, middle, end in _flatten(ctx.ranges):
            if middle > start:
                add(b, slice(start, end), slice(start, middle), False)
            if end > middle:
                add(b, slice(middle, end), slice(middle, end), True)
        return *grads, None, None


def _flatten(ranges):
    """Yield (slice of one sequence, start, context end, end) of every sample."""
    for row, row_ranges in enumerate(ranges):
        for start, middle, end in row_ranges:
            yield slice(row, row + 1), start, middle, end


def _merge(first, second):
    """Attention over two disjoint sets of keys from that over each, as (output, log-sum-exp)."""
    (first_out, first_lse), (second_out, second_lse) = first, second
    lse = torch.logaddexp(first_lse, second_lse)
    first_share = (first_lse - lse).exp().unsqueeze(-1)
    second_share = (second_lse - lse).exp().unsqueeze(-1)
    return (first_out * first_share + second_out * second_share).to(first_out.dtype), lse
