"""--rampup-batch-size as the schedule that Megatron reads."""

from argparse import Namespace
from bisect import bisect

from megatron_glm.flag_rules import FlagError


def ramp_batch_size(args: Namespace) -> None:
    """Fills in `args.step_batch_size_schedule` where a ramp is asked for.

    Megatron parses --rampup-batch-size, and trains with the last batch size from the first step on.
    FlagError where the ramp cannot be gone, on these ranks or at all.
    """
    if not args.rampup_batch_size:
        return
    start, increment, samples = map(int, args.rampup_batch_size)
    last = args.global_batch_size
    flag = f"--rampup-batch-size {start} {increment} {samples}"
    if last is None or not args.train_samples:
        raise FlagError(
            f"{flag}: needs --global-batch-size, where it ends, and --train-samples, in which it "
            "counts, in place of --train-iters"
        )
    models = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    whole = args.micro_batch_size * (args.world_size // models)
    if not (whole <= start < last <= samples and 0 < increment and (last - start) % increment == 0):
        raise FlagError(
            f"{flag}: must reach --global-batch-size {last} in whole increments over at least as "
            f"many samples, from {whole} or more, --micro-batch-size x the data parallel ranks"
        )
    if not args.decrease_batch_size_if_needed and (start % whole or increment % whole):
        raise FlagError(
            f"{flag}: must have batches divisible by {whole}, --micro-batch-size x the data "
            "parallel ranks; give others, or --decrease-batch-size-if-needed, which rounds them"
        )
    schedule = [
        (begin, size // whole * whole)
        for begin, size in schedule_of_ramp(start, increment, samples, last)
    ]
    # In tokens.
    args.step_batch_size_schedule = " ".join(
        f"{begin * args.seq_length}:{size}" for begin, size in schedule
    )
    # Megatron would begin a last step, and find no samples for it.
    args.train_samples = samples_of_whole_steps(schedule, args.train_samples)
    # Beside a schedule Megatron refuses what was given as --global-batch-size, but needs the value,
    # and refuses to round.
    args._is_global_batch_size_explicitly_specified = False
    args.decrease_batch_size_if_needed = False


def schedule_of_ramp(
    start: int, increment: int, samples: int, last: int
) -> list[tuple[int, int]]:
    """From how many consumed samples on a batch has which size: from `start` in equal shares of
    `samples` to `last`, by whole increments."""
    sizes = range(start, last, increment)
    shares = [(-(-samples * i // len(sizes)), size) for i, size in enumerate(sizes)]
    return [*shares, (samples, last)]


def samples_of_whole_steps(schedule: list[tuple[int, int]], samples: int) -> int:
    """What the steps of a run of at most so many samples consume."""
    begins, sizes = zip(*schedule, strict=True)
    consumed = 0
    while (after := consumed + sizes[bisect(begins, consumed) - 1]) <= samples:
        consumed = after
    return consumed
