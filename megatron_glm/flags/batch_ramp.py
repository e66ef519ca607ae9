"""--rampup-batch-size and --step-batch-size-schedule as the schedule that Megatron reads."""

import logging
from argparse import Namespace
from itertools import pairwise

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_glm.errors import FlagError
from megatron_glm.flags.rules import check_first_step, smallest_batch_of
from megatron_glm.planning.batch_sizes import SMALLEST_BATCH, schedule_of_ramp


def ramp_batch_size(args: Namespace) -> None:
    """Settles the schedule of batch sizes where one is asked for.

    Megatron parses --rampup-batch-size, and trains with the last batch size from the first step on.
    FlagError where the batch cannot grow so, on these ranks or at all.
    """
    if args.rampup_batch_size:
        schedule = _read_ramp(args, smallest_batch_of(args))
    elif args.step_batch_size_schedule:
        schedule = _read_steps(args, smallest_batch_of(args))
    else:
        return
    check_first_step(args, schedule[0][1])
    # In tokens.
    args.step_batch_size_schedule = " ".join(
        f"{begin * args.seq_length}:{size}" for begin, size in schedule
    )
    # Beside a schedule Megatron refuses what was given as --global-batch-size, but needs the value,
    # and refuses to round.
    args.global_batch_size = schedule[-1][1]
    args._is_global_batch_size_explicitly_specified = False
    args.decrease_batch_size_if_needed = False
    # A line for each size, 169 for GLM-130B; every report of a run has its batch size.
    logging.getLogger("megatron.core.num_microbatches_calculator").setLevel(logging.WARNING)


def _read_ramp(args: Namespace, whole: int) -> list[tuple[int, int]]:
    """whole: what batches are multiples of."""
    start, increment, samples = args.rampup_batch_size
    last = args.global_batch_size
    flag = f"--rampup-batch-size {start} {increment} {samples}"
    if last is None or not args.train_samples or args.step_batch_size_schedule:
        raise FlagError(
            f"{flag}: needs --global-batch-size, where it ends, and --train-samples, in which it "
            "counts, in place of --train-iters and --step-batch-size-schedule"
        )
    if not (whole <= start < last <= samples and 0 < increment and (last - start) % increment == 0):
        raise FlagError(
            f"{flag}: must reach --global-batch-size {last} in whole increments over at least as "
            f"many samples, from {whole} or more, {SMALLEST_BATCH}"
        )
    if not args.decrease_batch_size_if_needed and (start % whole or increment % whole):
        raise FlagError(
            f"{flag}: must have batches divisible by {whole}, {SMALLEST_BATCH}; give others, or "
            "--decrease-batch-size-if-needed, which rounds them"
        )
    return schedule_of_ramp(start, increment, samples, last, whole)


def _read_steps(args: Namespace, whole: int) -> list[tuple[int, int]]:
    flag = f'--step-batch-size-schedule "{args.step_batch_size_schedule}"'
    if args.global_batch_size is not None or not args.train_samples:
        raise FlagError(
            f"{flag}: needs --train-samples, in place of --train-iters, and no --global-batch-size"
        )
    try:
        schedule = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(
            args.step_batch_size_schedule, args.seq_length
        )
        begins, sizes = zip(*schedule, strict=True)
    except ValueError as error:
        raise FlagError(
            f"{flag}: must be pairs of tokens and batch size, like 0:768 250B:1536"
        ) from error
    if (
        begins[0] != 0
        or not all(a < b for a, b in pairwise(begins))
        or not all(a < b for a, b in pairwise(sizes))
        or any(size < whole or size % whole for size in sizes)
    ):
        raise FlagError(
            f"{flag}: must begin at 0 and grow, with batches divisible by {whole}, "
            f"{SMALLEST_BATCH}"
        )
    return schedule
