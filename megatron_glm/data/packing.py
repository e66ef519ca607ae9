"""Samples into one sequence, and a sequence into the parts that become samples: pure functions."""

from collections.abc import Sequence

import numpy as np

from megatron_glm.data.blank_infilling import NO_OBJECTIVE, Sample

NO_SOURCE = -1


def pack_samples(
    samples: Sequence[Sample], source: int, seq_length: int, max_samples: int, pad: int
) -> dict[str, np.ndarray]:
    """Lays samples behind one another into one sequence, as a data loader collates it.

    source: index of the corpus that the samples are from.

    Returns tokens, labels, loss_mask, position_ids of shape [seq_length], and context_lengths,
    sample_ends, objectives, sources of shape [max_samples]. Padding is a last sample without
    context or loss, at position 0; unused rows have sample_ends = seq_length. Raises ValueError
    where the samples, with the row that padding takes, do not fit.
    """
    ends = np.cumsum([len(sample.tokens) for sample in samples], dtype=np.int64)
    num_samples, used = len(samples), int(ends[-1]) if len(samples) else 0
    if used > seq_length or num_samples + (used < seq_length) > max_samples:
        raise ValueError(
            f"{num_samples} samples of {used} tokens do not fit in {seq_length} tokens and "
            f"{max_samples} rows"
        )
    sequence = {
        "tokens": np.full(seq_length, pad, dtype=np.int64),
        "labels": np.full(seq_length, pad, dtype=np.int64),
        "loss_mask": np.zeros(seq_length, dtype=np.float32),
        "position_ids": np.zeros(seq_length, dtype=np.int64),
        "context_lengths": np.zeros(max_samples, dtype=np.int64),
        "sample_ends": np.full(max_samples, seq_length, dtype=np.int64),
        "objectives": np.full(max_samples, NO_OBJECTIVE, dtype=np.int64),
        "sources": np.full(max_samples, NO_SOURCE, dtype=np.int64),
    }
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        parts = [getattr(sample, name) for sample in samples]
        if parts:
            np.concatenate(parts, out=sequence[name][:used])
    sequence["context_lengths"][:num_samples] = [sample.context_length for sample in samples]
    sequence["sample_ends"][:num_samples] = ends
    sequence["objectives"][:num_samples] = [sample.objective for sample in samples]
    sequence["sources"][:num_samples] = source
    return sequence


def split_evenly(total: int, num_parts: int) -> np.ndarray:
    """Sizes of `num_parts` parts of `total`, differing by at most one: [num_parts] int64."""
    edges = np.arange(num_parts + 1, dtype=np.int64) * total // num_parts
    return np.diff(edges)


def share_out(total: int, sizes: np.ndarray) -> np.ndarray:
    """Deals `total` in proportion to sizes by largest remainder: [k] int64, summing to total.

    sizes: [k] int64, not all 0. No part is dealt more than its size while total <= sum(sizes).
    """
    scaled = total * sizes.astype(np.int64)
    dealt, remainders = np.divmod(scaled, sizes.sum())
    missing = total - int(dealt.sum())
    if missing:
        dealt[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return dealt


def best_fit(
    lengths: np.ndarray, seq_length: int, max_samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packs samples greedily: the longest first, each where it leaves least room.

    lengths: [n] int64, each at most seq_length. max_samples: most samples in a sequence.

    Returns order, [n] int64, the samples sequence by sequence, and ends, [m] int64, where each
    sequence ends in it. Takes about a second for a million samples.
    """
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    counts: list[int] = []
    # Sequences by the room that is left in them; bit r of `rooms` tells whether there is one.
    by_room: list[list[int]] = [[] for _ in range(seq_length + 1)]
    rooms = 0
    for sample in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[sample])
        if fitting := rooms >> length:
            room = length + (fitting & -fitting).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            counts[sequence] += 1
        else:
            room, sequence = seq_length, len(counts)
            counts.append(1)
        sequence_of[sample] = sequence
        room -= length
        if counts[sequence] < max_samples:
            by_room[room].append(sequence)
            rooms |= 1 << room
    return np.argsort(sequence_of, kind="stable"), np.cumsum(counts, dtype=np.int64)
