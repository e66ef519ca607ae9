"""Evaluation has data to the end of a run; what there is none of is left out, a split or a loss."""

import contextlib
import io
import math
import re
from argparse import Namespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.training import training

from megatron_glm.training.evaluation import evaluate_only_data, num_validation_sequences
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


@pytest.mark.parametrize("losses, reported", [
    ({"lm loss": 2.0, "lm loss [MASK]": math.nan, "lm loss b": 3.0}, ["lm loss", "lm loss b"]),
    ({"lm loss": math.nan, "lm loss [MASK]": math.nan}, ["lm loss", "lm loss [MASK]"]),
    ({}, []),
], ids=str)  # fmt: skip
def test_what_had_no_data_is_not_reported(monkeypatch, losses, reported):
    given = {name: torch.tensor(loss) for name, loss in losses.items()}
    monkeypatch.setattr(training, "evaluate", lambda: (given, "data", False))
    monkeypatch.setattr(training, "evaluate_and_print_results", print)
    evaluate_only_data()
    found, *rest = training.evaluate()
    assert [*found] == reported and rest == ["data", False]


def test_a_time_limit_ends_an_evaluation(monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda: (None, None, True))
    monkeypatch.setattr(training, "evaluate_and_print_results", print)
    evaluate_only_data()
    assert training.evaluate() == (None, None, True)


def evaluated(flags: list[str]) -> list[list[str]]:
    """The splits that a run evaluates, each with what it reports the losses of."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        pretrain_on_this_rank(flags)
    return [
        [line.split("|")[0].strip(), *re.findall(r"\| (lm loss[^:]*) value:", line)]
        for line in out.getvalue().splitlines()
        if "loss at" in line
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("flags, split", [
    (["--split", "9,0,1", "--train-iters", "2"],
     "validation loss at iteration 2 on test set"),
    (["--split", "0,0,1", "--skip-train", "--train-samples", "16"],
     "validation loss at iteration 0 on test set"),
], ids=" ".join)  # fmt: skip
def test_what_has_no_data_is_not_evaluated(corpus, flags, split):
    # Of so few sequences none is a [MASK] one.
    run = [*TINY, *corpus.flags, "--lr-warmup-iters", "0", "--eval-iters", "1", "--eval-interval",
           "1", "--eval-micro-batch-size", "4", "--gpt-prob", "0.9999", *flags]  # fmt: skip
    found = run_ranks(evaluated, run, world_size=1, initialize=False)
    assert found == [[[split, "lm loss", "lm loss [gMASK]"]]]
