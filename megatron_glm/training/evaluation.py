"""What Megatron's evaluation lacks: an end of its own to the validation data, and none where there
is no data."""

from argparse import Namespace
from functools import wraps
from typing import Any


def num_validation_sequences(args: Namespace) -> int:
    """Sequences of the validation split up to the end of a run, each evaluation reading the next.

    Megatron counts those of a run that had these flags from its start. One that goes on with a
    longer --eval-interval or fewer --eval-iters has read more, and with --start-eval-at-iter the
    last evaluation is forgotten: either ends in a StopIteration.
    """
    if not args.eval_iters:
        return 0
    evaluations = 1 if args.skip_train else args.train_iters // args.eval_interval + 1
    return args.consumed_valid_samples + evaluations * args.eval_iters * args.eval_global_batch_size


def evaluate_only_data() -> None:
    """Has what there is no data of left out: a split, such as validation with --split 99,0,1, where
    Megatron reads from None, and an objective or a source, of which it reports nan."""
    from megatron.training import training

    evaluate, print_results = training.evaluate, training.evaluate_and_print_results

    @wraps(evaluate)
    def evaluate_parts(*args, **kwargs) -> tuple:
        losses, *rest = evaluate(*args, **kwargs)
        # A model that has diverged shows so. Empty but on the last stage, None at a time limit.
        if losses and not losses["lm loss"].isnan():
            losses = {name: loss for name, loss in losses.items() if not loss.isnan()}
        return losses, *rest

    @wraps(print_results)
    def evaluate_data(prefix: str, forward_step: Any, data_iterator: Any, *args, **kwargs) -> None:
        # One for each virtual stage. Every rank reads for itself, and so has one where any has.
        stages = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        if None not in stages:
            print_results(prefix, forward_step, data_iterator, *args, **kwargs)

    training.evaluate = evaluate_parts
    training.evaluate_and_print_results = evaluate_data
