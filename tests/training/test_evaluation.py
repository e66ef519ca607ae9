"""Evaluation has data to the end of a run, and is left out where there is none."""

import contextlib
import io
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.training.evaluation import num_validation_sequences
from tests.ranks import run_ranks
from tests.training.pretraining import TINY, pretrain_on_this_rank


@given(
    st.integers(1, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 20),
)  # fmt: skip
def test_a_run_that_goes_on_with_other_flags_has_validation_data_to_its_end(
    train_iters, stopped, interval, interval_before, eval_iters, eval_iters_before, start
):
    batch, consumed = 4, 0
    for iteration in range(1, train_iters + 1):
        went_on = iteration > stopped
        if iteration % (interval if went_on else interval_before) == 0 and iteration >= start:
            consumed += (eval_iters if went_on else eval_iters_before) * batch
        if iteration == max(1, min(stopped, train_iters)):
            args = Namespace(train_iters=train_iters, eval_interval=interval, eval_iters=eval_iters,
                             eval_global_batch_size=batch, consumed_valid_samples=consumed,
                             skip_train=False)  # fmt: skip
            length = num_validation_sequences(args)
    assert consumed + eval_iters * batch <= length  # With the evaluation after the last step.


def evaluated(flags: list[str]) -> list[str]:
    """The splits that a run evaluates."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        pretrain_on_this_rank(flags)
    return [line.split("|")[0] for line in out.getvalue().splitlines() if "loss at" in line]


@pytest.mark.ranks
@pytest.mark.parametrize("flags, expected", [
    (["--split", "9,0,1", "--train-iters", "2"],
     [" validation loss at iteration 2 on test set "]),
    (["--split", "0,0,1", "--skip-train", "--train-samples", "16"],
     [" validation loss at iteration 0 on test set "]),
], ids=" ".join)  # fmt: skip
def test_a_split_without_data_is_not_evaluated(corpus, flags, expected):
    run = [*TINY, *corpus.flags, "--lr-warmup-iters", "0", "--eval-iters", "1", "--eval-interval",
           "1", "--eval-micro-batch-size", "4", *flags]  # fmt: skip
    assert run_ranks(evaluated, run, world_size=1, initialize=False) == [expected]
