"""A run goes on with another learning rate where that is asked for, and with no other."""

import contextlib
import io
import sys

import pytest

from tests.ranks import run_ranks
from tests.training.pretraining import TINY, pretrain

pytestmark = pytest.mark.ranks
STOP, TOTAL = 2, 5
BY_FLAGS, BY_CHECKPOINT = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def learning_rates_on_this_rank(flags):
    """The learning rate of every step, as the optimizer's parameter groups had it."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    import pretrain_glm

    rates = []

    def note_rates(optimizer, args, kwargs):
        rates.append({group["lr"] for group in optimizer.param_groups})

    register_optimizer_step_pre_hook(note_rates)
    sys.argv = ["pretrain_glm.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        pretrain_glm.main()
    return rates


@pytest.mark.parametrize("more", [
    [], ["--bf16"], ["--use-distributed-optimizer"], ["--use-distributed-optimizer", "--bf16"],
], ids=" ".join)  # fmt: skip
def test_the_learning_rate_of_a_resumed_run_is_the_one_asked_for(corpus, tmp_path, more):
    flags = [*TINY, *corpus.flags, "--train-iters", str(TOTAL), "--lr-decay-style", "constant",
             "--load", str(tmp_path), *more]  # fmt: skip
    pretrain([*flags, "--save", str(tmp_path), "--exit-interval", str(STOP)])
    for flag, expected in ((BY_FLAGS, 5e-4), (BY_CHECKPOINT, 1e-3)):
        (rates,) = run_ranks(
            learning_rates_on_this_rank, [*flags, "--lr", "5e-4", flag], world_size=1,
            initialize=False,
        )  # fmt: skip
        assert rates == [{expected}] * (TOTAL - STOP), flag
