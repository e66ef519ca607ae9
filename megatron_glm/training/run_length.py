"""How far a run goes, from where it is."""

from argparse import Namespace

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_glm.errors import GLMError
from megatron_glm.flags.batch_ramp import whole_steps


def num_training_sequences(args: Namespace) -> int:
    """Sequences of the training split up to the end of a run. Of one that counts in samples, sets
    `args.train_iters`.

    Megatron counts as if a run had these flags from its start. One that goes on with another
    --global-batch-size would end early without a word, or in a StopIteration.

    Raises:
        GLMError: the checkpoint that was loaded is the end already.
    """
    consumed, schedule = args.consumed_train_samples, [(0, args.global_batch_size)]
    if args.step_batch_size_schedule:
        schedule = StepBatchsizeNumMicroBatchesCalculator._parse_schedule(
            args.step_batch_size_schedule, args.seq_length
        )
    if args.train_samples:
        num_steps, end = whole_steps(schedule, args.train_samples, consumed)
        args.train_iters = args.iteration + num_steps
    else:
        num_steps = max(args.train_iters - args.iteration, 0)
        end = consumed + num_steps * args.global_batch_size
    if num_steps == 0 and not args.skip_train:
        raise GLMError(
            f"--load {args.load}: iteration {args.iteration} has seen all {consumed} samples of "
            "this run already; raise --train-iters or --train-samples to go on (with "
            "--override-opt-param-scheduler, where that makes the schedule longer too), or pass "
            "--skip-train to evaluate it"
        )
    return end
