"""The batch grows as a ramp or a schedule of steps says, over a resumption too."""

import contextlib
import io
import logging
import sys
from argparse import Namespace

import pytest
from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

from megatron_glm.errors import FlagError
from megatron_glm.flags.arguments import parse_glm_args
from megatron_glm.flags.batch_ramp import ramp_batch_size
from tests.ranks import run_ranks
from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain


def batch_size(consumed: int, start: int, increment: int, samples: int, last: int) -> int:
    """The definition: as many increments as shares of the samples have been consumed."""
    num_increments = (last - start) // increment
    return last if consumed >= samples else start + consumed * num_increments // samples * increment


@pytest.mark.parametrize("ramp", [
    (2, 2, 12, 8), (192, 24, 5493164, 4224), (8, 8, 1001, 64), (4, 4, 8, 8),
])  # fmt: skip
def test_megatron_reads_the_ramp_in_the_schedule(ramp, caplog):
    caplog.set_level(logging.INFO)
    samples = ramp[2]
    args = flags(rampup_batch_size=list(ramp[:3]), global_batch_size=ramp[3],
                 world_size=4, micro_batch_size=1, train_samples=3 * samples)  # fmt: skip
    ramp_batch_size(args)
    calculator = StepBatchsizeNumMicroBatchesCalculator(
        1, 1, False, 0, args.step_batch_size_schedule, args.seq_length
    )
    assert not caplog.records
    for consumed in {*range(0, 2 * samples, max(1, samples // 997)), samples - 1, samples}:
        calculator.update(consumed, consistency_check=False)
        assert calculator.get_current_global_batch_size() == batch_size(consumed, *ramp)


def flags(**changes) -> Namespace:
    return Namespace(**{
        "rampup_batch_size": [16, 8, 100], "global_batch_size": 64, "micro_batch_size": 2,
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "world_size": 16,
        "train_samples": 1000, "decrease_batch_size_if_needed": False, "seq_length": 32,
        "step_batch_size_schedule": None, "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None, "pipeline_model_parallel_layout": None,
    } | changes)  # fmt: skip


def test_without_a_ramp_nothing_changes():
    args = flags(rampup_batch_size=None)
    ramp_batch_size(args)
    assert args == flags(rampup_batch_size=None)


def test_a_ramp_is_a_schedule_in_tokens():
    ramp_batch_size(args := flags())
    assert args.step_batch_size_schedule.startswith("0:16 544:24 ")
    assert args.global_batch_size == 64


def test_batches_that_the_ranks_cannot_share_are_rounded_down_on_request():
    args = flags(micro_batch_size=3, global_batch_size=48, decrease_batch_size_if_needed=True)
    ramp_batch_size(args)
    sizes = [int(step.partition(":")[2]) for step in args.step_batch_size_schedule.split()]
    assert sizes == [12, 24, 24, 36, 48]
    assert not args.decrease_batch_size_if_needed


@pytest.mark.parametrize("changes", [
    {"global_batch_size": None}, {"train_samples": None},
    {"micro_batch_size": 5, "decrease_batch_size_if_needed": True},
    {"rampup_batch_size": [16, 0, 100]}, {"rampup_batch_size": [16, 40, 100]},
    {"rampup_batch_size": [0, 8, 100]}, {"rampup_batch_size": [64, 8, 100]},
    {"rampup_batch_size": [16, 8, 5]}, {"rampup_batch_size": [60, 4, 100]},
    {"micro_batch_size": 3}, {"num_virtual_stages_per_pipeline_rank": 2},
], ids=str)  # fmt: skip
def test_a_ramp_that_cannot_be_gone_is_refused(changes):
    with pytest.raises(FlagError, match="--rampup-batch-size [0-9 ]+: (needs|must)"):
        ramp_batch_size(flags(**changes))


STEPS = {"rampup_batch_size": None, "global_batch_size": None}


def test_a_schedule_in_tokens_begins_its_sizes_by_whole_samples():
    args = flags(**STEPS, step_batch_size_schedule="0:16 1K:24 2K:64")
    ramp_batch_size(args)
    # 1000 // 32 = 31 samples by batches of 16, then 62 by those of 24, then those of 64.
    assert args.step_batch_size_schedule == "0:16 992:24 1984:64" and args.global_batch_size == 64


@pytest.mark.parametrize("schedule, changes", [
    ("0:16 1K:64", {"global_batch_size": 64}), ("0:16 1K:64", {"train_samples": None}),
    ("16,64", {}), ("0:a", {}), ("", {"step_batch_size_schedule": " "}), ("1K:16", {}),
    ("0:16 1K:8", {}), ("0:16 4:24 8:64", {}), ("0:16 1K:20", {"micro_batch_size": 4}),
], ids=str)  # fmt: skip
def test_a_schedule_that_cannot_be_gone_is_refused(schedule, changes):
    with pytest.raises(FlagError, match="--step-batch-size-schedule .*: (needs|must)"):
        ramp_batch_size(flags(**STEPS | {"step_batch_size_schedule": schedule} | changes))


@pytest.mark.parametrize("changes, first", [
    ({}, 16), (STEPS | {"step_batch_size_schedule": "0:32 1K:64"}, 32),
], ids=str)  # fmt: skip
def test_a_run_without_a_step_is_refused(changes, first):
    ramp_batch_size(flags(**changes, train_samples=first))
    with pytest.raises(FlagError, match=f"--train-samples {first - 1}: must be at least {first},"):
        ramp_batch_size(flags(**changes, train_samples=first - 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), num_documents=60)


def printed_at_the_start(flags: list[str]) -> str:
    sys.argv = ["pretrain_glm.py", *flags]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        parse_glm_args(lambda args: None)
    return out.getvalue()


@pytest.mark.ranks
def test_one_rank_shows_the_schedule(corpus):
    run = [*TINY, *corpus.flags, "--lr-warmup-iters", "0", "--train-samples", "24",
           "--micro-batch-size", "1", "--rampup-batch-size", "2", "2", "12"]  # fmt: skip
    first, second = run_ranks(printed_at_the_start, run, initialize=False)
    schedule = "> using step batch size schedule: 0:2 512:4 1024:6 1536:8"
    assert schedule in first and "schedule: " not in second


@pytest.mark.ranks
def test_a_run_goes_the_ramp_and_resumes_on_it(corpus, tmp_path):
    ramp, sizes = (2, 2, 12), []
    while (size := batch_size(sum(sizes), *ramp, 8)) <= 24 - sum(sizes):
        sizes.append(size)
    assert sizes == [2, 2, 4, 6, 8]
    run = [*TINY, *corpus.flags, "--lr-warmup-iters", "0", "--train-samples", "24",
           "--rampup-batch-size", *map(str, ramp), "--save", str(tmp_path), "--load",
           str(tmp_path)]  # fmt: skip
    assert len(pretrain([*run, "--exit-interval", "3"])) == 3
    assert len(pretrain(run)) == 2
