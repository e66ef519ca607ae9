"""Ends a run whose loss or gradient is no longer a number, before a checkpoint is written."""

import math
from argparse import Namespace
from collections.abc import Callable
from functools import wraps

from megatron_glm.errors import GLMError


class DivergenceError(GLMError):
    """A step found NaN or Inf."""

    def __init__(self, message: str, is_everywhere: bool):
        super().__init__(message)
        self.is_everywhere = is_everywhere


def check_steps(args: Namespace) -> None:
    """Checks each step by the two numbers that it reports, unless Megatron reruns bad steps.

    Takes the place of --check-for-nan-in-loss-and-grad, which waits for the device twice a
    micro-batch and twice a bucket of gradients. A step that finds NaN has changed the weights by
    the time it is seen, but nothing was saved since.
    """
    from megatron.training import training

    if not args.check_for_nan_in_loss_and_grad or args.rerun_mode != "disabled":
        return
    args.check_for_nan_in_loss_and_grad = False
    training.train_step = _checked(training.train_step)


def check_step(iteration: int, loss: float, grad_norm: float | None) -> None:
    """Raises DivergenceError where one of the two is not finite.

    loss: of the whole step, on the last pipeline stage; 0 elsewhere. grad_norm: the same on every
    rank; None where the step was skipped.
    """
    for value, name in ((loss, "loss"), (grad_norm or 0.0, "gradient")):
        if not math.isfinite(value):
            raise DivergenceError(
                f"found {'NaN' if math.isnan(value) else 'Inf'} in the {name} of iteration "
                f"{iteration}; the last whole checkpoint is untouched: resume from it with a "
                "smaller --shrink-embedding-gradient-alpha, a smaller --lr (and "
                "--override-opt-param-scheduler), or another --seed to see other data",
                is_everywhere=grad_norm is not None and not math.isfinite(grad_norm),
            )


def _checked(train_step: Callable) -> Callable:
    @wraps(train_step)
    def step(*args, **kwargs):
        report = train_step(*args, **kwargs)
        losses, grad_norm = report[0], report[5]
        # The device has nothing left to do by now: train_step has waited for the weights.
        loss = float(losses["lm loss"]) if losses else 0.0
        check_step(kwargs["iteration"] + 1, loss, grad_norm)
        return report

    return step
