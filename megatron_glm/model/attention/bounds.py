"""What each token sees: GLM's mask as one interval a row, from a few integers a sample.

`samples` is an int32 tensor [b, 2, k]: row 0 the context length of each sample of the pack, row 1
where it ends, in tokens. Sample j covers [end[j-1], end[j]); rows that end where their
predecessor does are unused. Token i of a sample that starts at `start` sees the keys

    start <= j < max(i + 1, start + context length)

(GLM-130B, arXiv 2210.02414, section 2.1). Both ends of that interval grow with i, so does the
interval of queries that see a given key: a block of rows is bounded by its first and last row.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SampleRange(NamedTuple):
    """One sample of a pack: tokens [start, end), of which [start, context_end) is context."""

    start: int
    context_end: int
    end: int


class Bounds(NamedTuple):
    """Half-open intervals of visibility, each int32 [b, s] and growing along s."""

    key_start: Tensor
    """First key that the query of this row sees."""
    key_end: Tensor
    """One past the last key that the query of this row sees."""
    query_start: Tensor
    """First query that sees the key of this row."""
    query_end: Tensor
    """One past the last query that sees the key of this row."""


def make_samples(context_lengths: Tensor, sample_ends: Tensor) -> Tensor:
    """Samples of a batch, int32 [b, 2, k], from two integer tensors [b, k]."""
    return torch.stack((context_lengths, sample_ends), dim=1).to(torch.int32)


def token_bounds(samples: Tensor, seq_length: int) -> Bounds:
    """Intervals of every token of `samples` [b, 2, k], made where `samples` lies, without a sync.

    Args:
        samples: int32 [b, 2, k], valid as by `validate_samples`.
        seq_length: s, tokens of a sequence.
    """
    contexts, ends = samples[:, 0], samples[:, 1].contiguous()
    batch = samples.shape[0]
    token = torch.arange(seq_length, device=samples.device, dtype=torch.int32)
    token = token.expand(batch, seq_length).contiguous()
    index = torch.searchsorted(ends, token, right=True)
    starts = torch.cat((ends.new_zeros(batch, 1), ends[:, :-1]), dim=1)
    start = starts.gather(1, index)
    context_end = start + contexts.gather(1, index)
    return Bounds(
        key_start=start,
        key_end=torch.maximum(token + 1, context_end),
        query_start=torch.where(token < context_end, start, token),
        query_end=ends.gather(1, index),
    )


class PerBatch:
    """Calls make(samples, seq_length) once for the layers and recomputations of a micro-batch.

    Keeps what it made of the last few `samples`, and these with it, so that their memory cannot
    be reused for others while the key, their address and version, is remembered.
    """

    def __init__(self, make: Callable[[Tensor, int], Any], num_kept: int = 4):
        self._make = make
        self._kept: deque = deque(maxlen=num_kept)

    def __call__(self, samples: Tensor, seq_length: int) -> Any:
        """What `make` returns or returned for these samples."""
        # An inference tensor has no version, and a captured graph must compute anew each replay.
        if samples.is_inference() or (samples.is_cuda and torch.cuda.is_current_stream_capturing()):
            return self._make(samples, seq_length)
        key = (samples.data_ptr(), samples._version, samples.shape, samples.device, seq_length)
        for kept_key, _, made in self._kept:
            if kept_key == key:
                return made
        made = self._make(samples, seq_length)
        self._kept.append((key, samples, made))
        return made


def dense_mask(samples: Tensor, seq_length: int) -> Tensor:
    """The mask itself, bool [b, s, s], True where query i sees key j. For reference and tests."""
    bounds = token_bounds(samples, seq_length)
    key = torch.arange(seq_length, device=samples.device, dtype=torch.int32)
    return (key >= bounds.key_start[..., None]) & (key < bounds.key_end[..., None])


def sample_ranges(samples: Tensor) -> list[list[SampleRange]]:
    """The samples of each sequence as Python integers; copies `samples` to the host."""
    batch = []
    for contexts, ends in samples.tolist():
        ranges, start = [], 0
        for context, end in zip(contexts, ends, strict=True):
            if end > start:
                ranges.append(SampleRange(start, start + context, end))
                start = end
        batch.append(ranges)
    return batch


def validate_samples(samples: Tensor, seq_length: int) -> None:
    """Check that `samples` describes packs of `seq_length` tokens; copies it to the host.

    Raises:
        TypeError: dtype other than int32.
        ValueError: a shape other than [b, 2, k], a pack that ends before or after `seq_length`,
            an end before its predecessor, or a context longer than its sample.
    """
    if samples.dtype != torch.int32:
        raise TypeError(f"samples has dtype {samples.dtype}: must be torch.int32")
    if samples.dim() != 3 or samples.shape[1] != 2 or samples.shape[2] < 1:
        raise ValueError(
            f"samples has shape {tuple(samples.shape)}: must be [batch, 2, samples a sequence], "
            "row 0 context lengths, row 1 sample ends"
        )
    for row, (contexts, ends) in enumerate(samples.tolist()):
        start = 0
        for index, (context, end) in enumerate(zip(contexts, ends, strict=True)):
            where = f"sequence {row}, sample {index}"
            if end < start:
                raise ValueError(f"{where} ends at {end}, before it starts at {start}")
            if not 0 <= context <= end - start:
                raise ValueError(
                    f"{where} has context length {context}: must lie in [0, {end - start}], "
                    f"the length of the sample [{start}, {end})"
                )
            start = end
        if start != seq_length:
            raise ValueError(
                f"the samples of sequence {row} end at {start} and the sequence has {seq_length} "
                "tokens: the last sample (padding, context length 0) must end with the sequence"
            )
