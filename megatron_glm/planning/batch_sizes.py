"""Batch sizes of a run, in sequences: what all are multiples of, and how they grow."""

SMALLEST_BATCH = "--micro-batch-size x data parallel ranks (x pipeline stages that interleave)"
"""What smallest_batch is, in a message."""


def smallest_batch(
    micro_batch_size: int, data_parallel_size: int, pipeline_size: int, interleaves: bool
) -> int:
    """What the batch of every step must be a multiple of: a micro-batch on every data parallel
    rank; where pipeline stages interleave, one for each of them, which Megatron takes as a group.
    """
    return micro_batch_size * data_parallel_size * (pipeline_size if interleaves else 1)


def schedule_of_ramp(
    start: int, increment: int, samples: int, last: int, whole: int
) -> list[tuple[int, int]]:
    """From how many consumed samples on a batch has which size: from `start` in equal shares of
    `samples` to `last`, by whole increments, each rounded down to a multiple of `whole`."""
    below = range(start, last, increment)
    return [
        (-(-samples * i // max(len(below), 1)), size // whole * whole)
        for i, size in enumerate([*below, last])
    ]
