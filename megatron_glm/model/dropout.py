"""Dropout as a pure function of a seed and a position.

Whether the attention probability of (sequence, head, query, key) is kept is a hash of these four
and two random words; a hidden state of (token, channel) is as the probability of query and key in
sequence and head 0. So nothing stores a mask, every implementation drops the same, and a recomputed
forward equals the first: Megatron restores the generator from which the seed is drawn.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Multipliers of the integer finalisers lowbias32 (nullprogram.com/blog/2018/07/31) and, without
# its last round, Murmur3, and the odd word nearest to 2**32 / golden ratio; written as the int32
# that has the same bits.
MIX = (0x7FEB352D, -0x7B935975)
HASH = (-0x7A143595, -0x3D4D51CB)
GOLDEN = -0x61C88647


class Dropout(NamedTuple):
    """What one call drops."""

    probability: float
    """Share of the elements that become 0, in (0, 1); the others grow by 1 / (1 - share)."""
    seed: Tensor
    """Two random words, int32 [2], on the device of what is dropped."""

    @property
    def keep_probability(self) -> float:
        """1 - probability."""
        return 1.0 - self.probability

    @property
    def threshold(self) -> int:
        """A hash, read as int32, below this is kept."""
        return round(self.keep_probability * 2**32) - 2**31


def draw_dropout(probability: float, device: torch.device) -> Dropout | None:
    """Draw the seed of one call from the default generator of `device`, without a sync.

    Returns:
        None where `probability` is 0.
    """
    if probability == 0.0:
        return None
    seed = torch.randint(-(2**31), 2**31, (2,), device=device, dtype=torch.int64)
    return Dropout(probability, seed.to(torch.int32))


def fixed_dropout(probability: float, device: torch.device) -> Dropout | None:
    """The same at every call, for what is asked of kernels before training: no generator draws.

    Returns:
        None where `probability` is 0.
    """
    if probability == 0.0:
        return None
    return Dropout(probability, torch.tensor([20221005, -7], dtype=torch.int32, device=device))


def _shift_xor(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits) with the logical shift that int32 lacks."""
    return x ^ ((x >> bits) & ((1 << (32 - bits)) - 1))


def mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which every output bit depends on every input bit."""
    x = _shift_xor(x, 16) * MIX[0]
    x = _shift_xor(x, 15) * MIX[1]
    return _shift_xor(x, 16)


def query_word(seed: Tensor, row: Tensor, query: Tensor) -> Tensor:
    """int32 word of a query; `row` numbers the (sequence, head) pairs of the call."""
    return mix(mix(row.to(torch.int32) * GOLDEN + seed[0]) + query.to(torch.int32))


def key_word(seed: Tensor, key: Tensor) -> Tensor:
    """int32 word of a key, the same for every sequence and head.

    Not mixed: a kernel makes it anew in every block, and the words of queries are random enough.
    """
    return key.to(torch.int32) * GOLDEN + seed[1]


def is_kept(query_words: Tensor, key_words: Tensor, threshold: int | Tensor) -> Tensor:
    """Whether the probability of each pair of words is kept, bool, broadcast over both."""
    word = (query_words ^ key_words) * HASH[0]
    return _shift_xor(word, 15) * HASH[1] < threshold


def keep_mask(dropout: Dropout, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Mask of what is kept, bool [*row.shape, queries, keys].

    Args:
        dropout: rate and seed.
        row: integer tensor of any shape, the (sequence, head) pairs as sequence * n + head.
        query, key: integer tensors [queries] and [keys], positions in the sequence.
    """
    queries = query_word(dropout.seed, row[..., None], query)
    keys = key_word(dropout.seed, key)
    return is_kept(queries[..., None], keys, dropout.threshold)


def drop_channels(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout of hidden states [..., h], whose tokens are counted over all leading dimensions."""
    if dropout is None:
        return x
    rows = torch.arange(x.shape[:-1].numel(), device=x.device)
    columns = torch.arange(x.shape[-1], device=x.device)
    kept = keep_mask(dropout, torch.zeros_like(rows[0]), rows, columns)
    return x * kept.view(x.shape) / dropout.keep_probability
