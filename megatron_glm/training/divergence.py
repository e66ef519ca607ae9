"""Ends a run whose loss or gradient is no longer a number, before a checkpoint is written."""

import math
from argparse import Namespace

from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.training.hooks import run_after_steps


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
    if not args.check_for_nan_in_loss_and_grad or args.rerun_mode != "disabled":
        return
    args.check_for_nan_in_loss_and_grad = False
    run_after_steps(check_step)


def check_step(iteration: int, losses: dict[str, Tensor], grad_norm: float | None) -> None:
    """Raises DivergenceError where loss or gradient is not finite; what `run_after_steps` calls.

    Of the losses, "lm loss" is that of the whole step. grad_norm is the same on every rank.
    """
    # The device has nothing left to do by now: the step has waited for the weights.
    loss = float(losses["lm loss"]) if losses else 0.0
    for value, name in ((loss, "loss"), (grad_norm or 0.0, "gradient")):
        if not math.isfinite(value):
            raise DivergenceError(
                f"found {'NaN' if math.isnan(value) else 'Inf'} in the {name} of iteration "
                f"{iteration}; the last whole checkpoint is untouched: resume from it with a "
                "smaller --shrink-embedding-gradient-alpha, a smaller --lr (and "
                "--override-opt-param-scheduler), or another --seed to see other data",
                is_everywhere=grad_norm is not None and not math.isfinite(grad_norm),
            )
