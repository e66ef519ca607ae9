"""How far a run goes, from where it is."""

from argparse import Namespace

from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    update_num_microbatches,
)

from megatron_glm.errors import GLMError


def num_training_sequences(args: Namespace) -> int:
    """Sequences of the training split up to the end of a run. Of one that counts in samples, sets
    `args.train_iters`.

    Megatron counts as if a run had these flags from its start. One that goes on with another
    --global-batch-size would end early without a word, or in a StopIteration.

    Raises:
        GLMError: the checkpoint that was loaded is the end already.
    """
    end = args.consumed_train_samples
    if args.train_samples:
        args.train_iters = args.iteration
        while (after := end + _batch_size(end)) <= args.train_samples:
            args.train_iters, end = args.train_iters + 1, after
        update_num_microbatches(args.consumed_train_samples, consistency_check=False)
    else:
        end += max(args.train_iters - args.iteration, 0) * args.global_batch_size
    if end == args.consumed_train_samples and not args.skip_train:
        raise GLMError(
            f"--load {args.load}: iteration {args.iteration} has seen all {end} samples of this "
            "run already; raise --train-iters or --train-samples to go on (with "
            "--override-opt-param-scheduler, where that makes the schedule longer too), or pass "
            "--skip-train to evaluate it"
        )
    return end


def _batch_size(consumed: int) -> int:
    """Sequences of the step that begins there."""
    update_num_microbatches(consumed, consistency_check=False)
    return get_current_global_batch_size()
