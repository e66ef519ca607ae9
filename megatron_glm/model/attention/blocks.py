"""Which blocks of the mask hold anything, as lists that kernels walk along."""

import torch
from torch import Tensor

from megatron_glm.model.attention.bounds import Bounds


def block_masks(bounds: Bounds, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Blocks of the mask of which some is visible, and of these the ones that are it altogether.

    A block may be in the first in vain, at most. Made on the device without a sync.

    Args:
        queries, keys: rows and columns of a block.

    Returns:
        (partial, full): bool [b, blocks of queries, blocks of keys]; none is in both.
    """
    key_start, key_end = bounds.key_start, bounds.key_end
    seq_length, device = key_start.shape[1], key_start.device
    first = torch.arange(0, seq_length, queries, device=device)
    last = (first + queries).clamp_max(seq_length) - 1
    block_start = torch.arange(0, seq_length, keys, device=device)
    block_end = (block_start + keys).clamp_max(seq_length)
    # Both ends of the interval grow along the rows: the first row of a block sees furthest back
    # and its last row furthest ahead; what the two have in common, every row of the block sees.
    some = (block_end > key_start[:, first, None]) & (block_start < key_end[:, last, None])
    full = (block_start >= key_start[:, last, None]) & (block_end <= key_end[:, first, None])
    return some & ~full, full


def block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The True blocks of each row of bool [b, m, n]: their number, int32 [b, 1, m], and their
    columns in order, followed by those of the others, int32 [b, 1, m, n]; both contiguous."""
    blocks = blocks[:, None].contiguous()
    count = blocks.sum(dim=-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return count, columns.to(torch.int32)
