"""Runs pretrain_glm.py inside a rank of a test and keeps every step's numbers unrounded."""

import contextlib
import json
import sys
from typing import Any, NamedTuple

from tests.null_gpu import run_on_null_gpu
from tests.ranks import run_ranks


class Step(NamedTuple):
    """Losses by name (empty on ranks that are not of the last stage) and the gradient norm."""

    losses: dict[str, float]
    grad_norm: float


TINY = [
    "--num-layers", "4", "--hidden-size", "64", "--ffn-hidden-size", "176",
    "--num-attention-heads", "4", "--seq-length", "128", "--hidden-dropout", "0",
    "--attention-dropout", "0", "--micro-batch-size", "2", "--global-batch-size", "8",
    "--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", "2", "--eval-iters", "0",
    "--log-interval", "100", "--num-workers", "0", "--seed", "7", "--no-mask-conformance-check",
]  # fmt: skip


def pretrain(flags: list[str], world_size: int = 1, timeout: float = 240.0) -> list[Step]:
    """The steps of a run of pretrain_glm.py with these flags, as the last rank saw them."""
    return run_ranks(
        pretrain_on_this_rank, flags, world_size=world_size, initialize=False, timeout=timeout
    )[-1]


def pretrain_on_this_rank(flags: list[str]) -> list[Step]:
    from megatron.training import training

    steps = []
    log = training.training_log

    # Megatron's log line rounds, averages, and shows step 2 together with step 1.
    def recording_log(loss_dict, total_loss_dict, lr, iteration, scale, memory, skipped, grad_norm,
                      *args, **kwargs):
        losses = {name: value.item() for name, value in loss_dict.items()}
        steps.append(Step(losses, float(grad_norm)))
        return log(loss_dict, total_loss_dict, lr, iteration, scale, memory, skipped, grad_norm,
                   *args, **kwargs)

    training.training_log = recording_log
    sys.argv = ["pretrain_glm.py", *flags]
    import pretrain_glm

    leaves_early = "--exit-interval" in flags
    with contextlib.suppress(SystemExit) if leaves_early else contextlib.nullcontext():
        pretrain_glm.main()
    return steps


def pretrain_on_null_gpu(program: str, flags: list[str]) -> Any:
    """What `program`, which runs pretrain_glm.py with these flags on the null GPU, prints last, as
    JSON. Kernels are not checked: none computes anything there."""
    done = run_on_null_gpu(program, *TINY, *flags, "--no-kernel-conformance-check")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def with_fixed_weights(flags: list[str], folder: str) -> list[str]:
    """The same flags, starting from one set of weights, which is written to `folder`.

    Megatron seeds its initialisation by pipeline rank, and draws other numbers in half precision.
    """
    pretrain([*flags, "--train-iters", "1", "--lr", "0", "--min-lr", "0", "--lr-warmup-iters", "0",
              "--save", folder, "--no-save-optim"])  # fmt: skip
    return [*flags, "--finetune", "--load", folder]
