"""Where a run is called between functions of Megatron's training loop, which has no hook there, and
what it leaves out of them."""

from collections.abc import Callable
from functools import wraps


def run_before_saves(action: Callable[[], None]) -> None:
    """Has every rank call `action` before each save."""
    from megatron.training import training

    save = training.save_checkpoint_and_time

    @wraps(save)
    def save_after_action(*args, **kwargs):
        action()
        return save(*args, **kwargs)

    training.save_checkpoint_and_time = save_after_action


def run_after_steps(action: Callable[[int, dict, float | None], None]) -> None:
    """Has every rank call `action` after each training step, before a save of it.

    action: takes the iteration, counted from 1, the loss and its parts by name (on the last
    pipeline stage; {} on the others) and the norm of the gradient (None where the step was
    skipped).
    """
    from megatron.training import training

    train_step = training.train_step

    @wraps(train_step)
    def step_before_action(*args, **kwargs):
        report = train_step(*args, **kwargs)
        action(kwargs["iteration"] + 1, report[0], report[5])
        return report

    training.train_step = step_before_action


def skip_warm_up() -> None:
    """Leaves out what costs 2 to 3 s at every start on a GPU: Megatron compiles functions of GPT's
    layers, of which GLM's kernels call none, and without these the first step compiles its own."""
    from megatron.training import initialize

    initialize._warmup_jit_function = lambda **_: None
