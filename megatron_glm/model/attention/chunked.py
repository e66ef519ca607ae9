"""Prefix attention a block of queries at a time: dropout on the CPU with memory linear in s.

Each block is computed densely over the keys that one of its queries sees, and again in the
backward from the saved log-sum-exp, so only one block's scores exist at a time.
"""

import torch
from torch import Tensor

from megatron_glm.model.attention.bounds import sample_ranges
from megatron_glm.model.dropout import Dropout, keep_mask

BLOCK = 128
"""Queries of a block: large enough for the matrix products, small beside a long sequence."""


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` by blocks of queries, fp64 for fp64 input."""
    rate, seed = (0.0, None) if dropout is None else dropout
    return _Chunked.apply(query, key, value, samples, softmax_scale, rate, seed)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, samples, softmax_scale, rate, seed):
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        o = out.permute(1, 2, 0, 3)
        lse = torch.empty(q.shape[:3], dtype=wide, device=query.device)
        dropout = None if seed is None else Dropout(rate, seed)
        blocks = list(_blocks(sample_ranges(samples)))
        for b, rows, keys, context_end in blocks:
            scores = _scores(q[b, :, rows].to(wide), k[b, :, keys].to(wide), softmax_scale)
            _hide(scores, rows, keys, context_end)
            lse[b, :, rows] = scores.logsumexp(dim=-1)
            probabilities = scores.sub_(lse[b, :, rows].unsqueeze(-1)).exp_()
            if dropout is not None:
                probabilities *= _dropout_factor(dropout, b, rows, keys, probabilities)
            o[b, :, rows] = (probabilities @ v[b, :, keys].to(wide)).to(out.dtype)
        ctx.save_for_backward(query, key, value, out, lse, seed)
        ctx.blocks, ctx.softmax_scale, ctx.rate = blocks, softmax_scale, rate
        seq_length, batch, heads, dim = out.shape
        return out.view(seq_length, batch, heads * dim)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, seed = ctx.saved_tensors
        dropout = None if seed is None else Dropout(ctx.rate, seed)
        wide = lse.dtype
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (query, key, value)]
        q, k, v, o, do, dq, dk, dv = (
            x.permute(1, 2, 0, 3)
            for x in (query, key, value, out, grad_out.reshape(out.shape), *grads)
        )
        for b, rows, keys, context_end in ctx.blocks:
            q_block, do_block = q[b, :, rows].to(wide), do[b, :, rows].to(wide)
            k_block, v_block = k[b, :, keys].to(wide), v[b, :, keys].to(wide)
            scores = _scores(q_block, k_block, ctx.softmax_scale)
            _hide(scores, rows, keys, context_end)
            probabilities = scores.sub_(lse[b, :, rows].unsqueeze(-1)).exp_()
            grad_probabilities = do_block @ v_block.mT
            dropped = probabilities
            if dropout is not None:
                factor = _dropout_factor(dropout, b, rows, keys, probabilities)
                grad_probabilities *= factor
                dropped = probabilities * factor
            dv[b, :, keys] += dropped.mT @ do_block
            # Equals sum_j probability * gradient, since the output is that sum over the values.
            delta = (do_block * o[b, :, rows].to(wide)).sum(dim=-1, keepdim=True)
            grad_scores = grad_probabilities.sub_(delta).mul_(probabilities)
            grad_scores *= ctx.softmax_scale
            dq[b, :, rows] = grad_scores @ k_block
            dk[b, :, keys] += grad_scores.mT @ q_block
        return *(g.to(query.dtype) for g in grads), None, None, None, None


def _blocks(ranges):
    """Yield (sequence, slice of queries, slice of the keys that they see, end of the context)."""
    for b, row_ranges in enumerate(ranges):
        for start, context_end, end in row_ranges:
            for first in range(start, end, BLOCK):
                last = min(first + BLOCK, end)
                yield b, slice(first, last), slice(start, max(last, context_end)), context_end


def _scores(query, key, scale):
    return (query * scale) @ key.mT


def _hide(scores, rows, keys, context_end):
    """Set the scores [n, queries, keys] that the mask hides to -inf, in place."""
    if rows.stop <= context_end:
        return
    query = torch.arange(rows.start, rows.stop, device=scores.device)
    key = torch.arange(keys.start, keys.stop, device=scores.device)
    seen_until = (query + 1).clamp_min(context_end)
    scores.masked_fill_(key >= seen_until[:, None], float("-inf"))


def _dropout_factor(dropout, b, rows, keys, probabilities):
    """1 / keep probability or 0 for each probability [n, queries, keys]."""
    heads, device = probabilities.shape[0], probabilities.device
    row = torch.arange(b * heads, (b + 1) * heads, device=device)
    kept = keep_mask(
        dropout,
        row,
        torch.arange(rows.start, rows.stop, device=device),
        torch.arange(keys.start, keys.stop, device=device),
    )
    return kept.to(probabilities.dtype).div_(dropout.keep_probability)
