"""With the patches, Megatron's trainer with its own GPT trains, stops and goes on without a GPU."""

import math
from functools import partial
from pathlib import Path

import pytest

from tests.patches.stock_gpt import train
from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.ranks

DISTRIBUTED = ("--use-distributed-optimizer",)
RESHARDABLE = (*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable")
TENSOR = ("--tensor-model-parallel-size", "2")
PIPELINE = ("--pipeline-model-parallel-size", "2")
FULL = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")


def run(*flags, world_size=2, **options):
    return run_ranks(partial(train, *flags, **options), world_size=world_size, initialize=False)


def stop_after(step, folder):
    return ("--save", str(folder), "--save-interval", str(step), "--exit-interval", str(step))


def go_on(folder, interval=100):
    return ("--load", str(folder), "--save", str(folder), "--save-interval", str(interval))


def from_step(losses, step):
    """What each rank saw from `step` on."""
    return [{s: values for s, values in rank.items() if s >= step} for rank in losses]


def mean_losses(losses):
    """Mean loss by step over the ranks that computed one."""
    ranks = [rank for rank in losses if rank]
    return {
        step: math.fsum(sum(rank[step]) for rank in ranks) / sum(len(rank[step]) for rank in ranks)
        for step in ranks[0]
    }


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="data parallel"),
        pytest.param(DISTRIBUTED, id="distributed optimizer"),
        pytest.param((*DISTRIBUTED, "--bf16"), id="distributed optimizer, bf16"),
        pytest.param(
            (*DISTRIBUTED, *TENSOR, "--fp16", "--initial-loss-scale", "64"), id="TP, fp16"
        ),
        pytest.param((*PIPELINE, "--bf16"), id="PP, bf16"),
    ],
)
def test_a_resumed_run_with_dropout_is_bit_equal_to_one_that_never_stopped(flags, tmp_path):
    whole = run(*flags, dropout=0.1)
    run(*flags, *stop_after(3, tmp_path), dropout=0.1)
    resumed = run(*flags, *go_on(tmp_path), dropout=0.1)
    assert any(resumed)
    assert resumed == from_step(whole, 3)


def test_a_run_resumes_at_another_layout(tmp_path):
    whole = mean_losses(run(*RESHARDABLE))
    run(*RESHARDABLE, *stop_after(3, tmp_path))
    for layout, world_size in (((), 1), (TENSOR, 2), (PIPELINE, 2)):
        flags = (*RESHARDABLE, *layout, "--load", str(tmp_path))
        resumed = mean_losses(run(*flags, world_size=world_size))
        assert list(resumed) == [3, 4, 5]
        for step, loss in resumed.items():
            assert loss == pytest.approx(whole[step], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "modes"),
    [
        pytest.param((), (FULL, (*SELECTIVE, "core_attn"), (*SELECTIVE, "mlp")), id="one rank"),
        pytest.param(TENSOR, (FULL,), id="TP"),
        pytest.param(PIPELINE, (FULL,), id="PP"),
    ],
)
def test_recomputation_with_dropout_changes_nothing(layout, modes):
    world_size = 2 if layout else 1
    plain = run(*layout, dropout=0.1, world_size=world_size)
    for mode in modes:
        assert run(*layout, *mode, dropout=0.1, world_size=world_size) == plain


def test_a_kill_during_a_save_loses_that_checkpoint_only(tmp_path):
    whole = run(*DISTRIBUTED)
    with pytest.raises(RankError, match="the process died"):
        run(*DISTRIBUTED, *go_on(tmp_path, 2), die_at_save="iter_0000004")
    assert any(Path(tmp_path, "iter_0000004").glob("*.distcp")), "killed too early to prove much"
    assert run(*DISTRIBUTED, *go_on(tmp_path, 2)) == from_step(whole, 2)


def test_a_kill_during_a_save_over_an_older_checkpoint_loses_that_only(tmp_path):
    whole = run(*DISTRIBUTED)
    run(*DISTRIBUTED, *stop_after(2, tmp_path))
    run(*DISTRIBUTED, "--load", str(tmp_path), *stop_after(4, tmp_path))
    # The run goes back to step 2 and is killed as it writes step 4 anew.
    back = (*go_on(tmp_path, 4), "--ckpt-step", "2")
    with pytest.raises(RankError, match="the process died"):
        run(*DISTRIBUTED, *back, die_at_save="iter_0000004")
    assert Path(tmp_path, "latest_checkpointed_iteration.txt").read_text() == "4"
    assert run(*DISTRIBUTED, *go_on(tmp_path)) == from_step(whole, 2)


@pytest.mark.parametrize("content", ["", "junk", "9"])
def test_an_unusable_tracker_means_the_newest_whole_checkpoint(content, tmp_path):
    run(*stop_after(2, tmp_path), world_size=1)
    Path(tmp_path, "latest_checkpointed_iteration.txt").write_text(content)
    (resumed,) = run(*go_on(tmp_path, 2), "--save-retain-interval", "4", world_size=1)
    assert list(resumed) == [2, 3, 4, 5]
    # What a save deletes is what the file named before.
    assert {path.name for path in tmp_path.glob("iter_*")} == {"iter_0000004", "iter_0000006"}
