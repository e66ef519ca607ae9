"""Prefix attention by the textbook, with the whole mask: what every other backend must equal."""

import torch
from torch import Tensor

from megatron_glm.model.attention.bounds import dense_mask
from megatron_glm.model.dropout import keep_mask


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """Dense `Attention`, fp64 for fp64 input; memory grows with s * s."""
    seq_length, batch, heads, dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("ibnd,jbnd->bnij", query.to(wide), key.to(wide)) * softmax_scale
    visible = dense_mask(samples, seq_length)[:, None]
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    if dropout is not None:
        rows = torch.arange(batch * heads, device=query.device).view(batch, heads)
        token = torch.arange(seq_length, device=query.device)
        kept = keep_mask(dropout, rows, token, token)
        probabilities = probabilities * kept / dropout.keep_probability
    context = torch.einsum("bnij,jbnd->ibnd", probabilities, value.to(wide))
    return context.to(query.dtype).reshape(seq_length, batch, heads * dim)
