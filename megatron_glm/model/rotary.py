"""Rotary positions by position id (paper, section 2.1: "Positional Encoding").

Dimension i of a head turns with i + d/2, by the angle of the token's position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ANGLE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""What --rotary-angle-dtype names."""


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


class RotaryTable:
    """Cosine and sine of every position, computed once and gathered by position id.

    Gathered values keep the rounding of fp16 angles, which compilers drop inside a graph. The
    table is computed on the CPU, so that every device rotates by the same numbers, and is no
    buffer: no cast of a model touches it and no checkpoint holds it.
    """

    def __init__(self, num_positions: int, head_dim: int, base: float, angle_dtype: str):
        """angle_dtype: fp32 or fp16; the other arguments as of `rotary_angles`."""
        # Named, since a model may be built under another default device.
        positions = torch.arange(num_positions, device="cpu")[None]
        angles = rotary_angles(positions, head_dim, base, ANGLE_DTYPES[angle_dtype])
        angles = angles[:, 0, 0, : head_dim // 2]
        self._table = torch.cat((angles.cos(), angles.sin()), dim=-1).float()

    def __call__(self, position_ids: Tensor) -> Tensor:
        """The rotation of every token, fp32 [s, b, 1, d]: d/2 cosines, then d/2 sines.

        position_ids: [b, s], integers. One that the table lacks stops the program: an IndexError
        on the CPU, an assertion of the device elsewhere, without a synchronisation.
        """
        if self._table.device != position_ids.device:
            self._table = self._table.to(position_ids.device)
        return F.embedding(position_ids.t(), self._table)[:, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns x [..., d] by a rotation [..., d], of the dtype of x: cosines, then sines, of d/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = rotation.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_query_key(
    mixed: Tensor, bias: Tensor | None, rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key of a mixed projection, rotated, and its value, each [s, b, n, d].

    mixed: [s, b, n, 3d], per head [q, k, v]. bias: [n * 3d], added first, or None where it has
    been. rotation: what `RotaryTable` gives; it is rounded to the dtype of `mixed`, as Megatron
    rounds its own.
    """
    if bias is not None:
        mixed = mixed + bias.view(mixed.shape[2:])
    query, key, value = mixed.chunk(3, dim=-1)
    rotation = rotation.to(mixed.dtype)
    return rotate(query, rotation), rotate(key, rotation), value
