"""Rotary angles by position id (paper, section 2.1: "Positional Encoding")."""

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> Tensor:
    """Angles of the rotate-half form for every token.

    position_ids: [b, s], integers from 0; a position may repeat (the tokens that fill a [MASK]).
    head_dim: d, even. base: of the inverse frequencies, 10000 in GLM-130B. dtype: float32, or
    float16 to round inverse frequencies, angles and then cosine and sine as the released GLM-130B
    did in training; whoever loads its weights needs the same (by position 2047 the angle is off by
    up to 0.98 rad).

    Returns [s, b, 1, d] in `dtype`, the layout in which Megatron applies rotary embeddings. It
    takes cosine and sine in the dtype of the angles, which completes the rounding.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    inverse_frequencies = (1.0 / base ** (exponents / head_dim)).to(dtype)
    angles = position_ids.to(dtype)[..., None] * inverse_frequencies
    return torch.cat((angles, angles), dim=-1).transpose(0, 1).unsqueeze(2).contiguous()
