"""Prefix attention on torch's FlexAttention: a block mask made on the device from the samples.

On a GPU the kernel is compiled once for each shape; the samples are its tensors, so no step, prefix
length or packing recompiles it, and running out of recompilations raises instead of falling back to
the dense form. Elsewhere it runs uncompiled, which is dense: for tests.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from megatron_glm.model.attention.blocks import block_lists, block_masks
from megatron_glm.model.attention.bounds import PerBatch, token_bounds
from megatron_glm.model.dropout import is_kept, key_word, query_word

BLOCK = 128
"""Rows and columns of a block of the mask; blocks that nothing sees are never visited."""


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` by blocks of the mask.

    The kernel has no dropout. With it, a second pass hides the scores of what is dropped, and
    exp(log-sum-exp of the kept - log-sum-exp of all) restores the normaliser: exact, at twice
    the work.
    """
    seq_length, batch, heads, dim = query.shape
    attend = _kernel(query.device.type)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    options = {"block_mask": _block_mask(samples, seq_length), "scale": softmax_scale}
    if dropout is None:
        out = attend(q, k, v, **options)
    else:
        _, every = attend(q, k, v, **options, return_aux=AuxRequest(lse=True))
        out, kept = attend(
            q, k, v, **options, return_aux=AuxRequest(lse=True),
            score_mod=_hide_dropped(dropout, batch, heads, seq_length),
        )
        share = (kept.lse - every.lse).exp() / dropout.keep_probability
        out = (out * share[..., None]).to(query.dtype)
    return out.permute(2, 0, 1, 3).reshape(seq_length, batch, heads * dim)


@cache
def _kernel(device):
    if device != "cuda":
        return flex_attention
    # Static: from a second shape on torch would compile for any length, which is slower.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def block_mask(samples: Tensor, seq_length: int) -> BlockMask:
    """FlexAttention's mask of `samples` [b, 2, k], by blocks, without a sync."""
    bounds = token_bounds(samples, seq_length)
    partial, full = block_masks(bounds, BLOCK, BLOCK)

    def visible(b, h, q, k):
        return (k >= bounds.key_start[b, q]) & (k < bounds.key_end[b, q])

    return BlockMask.from_kv_blocks(
        *block_lists(partial),
        *block_lists(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(seq_length, seq_length),
    )


_block_mask = PerBatch(block_mask)


def _hide_dropped(dropout, batch, heads, seq_length):
    device = dropout.seed.device
    token = torch.arange(seq_length, device=device)
    row = torch.arange(batch * heads, device=device).view(batch, heads, 1)
    query_words = query_word(dropout.seed, row, token)
    key_words = key_word(dropout.seed, token)
    # A tensor, as a number would be part of the compiled kernel.
    threshold = torch.full((), dropout.threshold, dtype=torch.int32, device=device)

    def hide(score, b, h, q, k):
        kept = is_kept(query_words[b, h, q], key_words[k], threshold)
        return torch.where(kept, score, -float("inf"))

    return hide
