"""A run that stops and goes on is the run that never stopped, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).parents[2]
STOP, TOTAL = 4, 14
DISTRIBUTED = ["--use-distributed-optimizer"]
SPLIT = [*DISTRIBUTED, "--use-precision-aware-optimizer", "--bf16"]
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def flags_of(corpus, folder, *more):
    return [*TINY, *corpus.flags, "--train-iters", str(TOTAL), "--save", str(folder),
            "--load", str(folder), "--save-interval", "1000", *more]  # fmt: skip


def stop_and_resume(flags, world_size):
    stopped = pretrain([*flags, "--exit-interval", str(STOP)], world_size)
    assert len(stopped) == STOP
    resumed = pretrain(flags, world_size)
    assert len(resumed) == TOTAL - STOP
    return stopped + resumed


@pytest.mark.parametrize("name, world_size, more", [
    ("one rank", 1, DROPOUT),
    ("one rank, distributed optimizer", 1, [*DROPOUT, *DISTRIBUTED]),
    ("dp 2, distributed optimizer", 2, [*DROPOUT, *DISTRIBUTED]),
    ("one rank, fp16", 1, [*DROPOUT, "--fp16"]),
    ("dp 2, distributed optimizer, bf16", 2, [*DROPOUT, *DISTRIBUTED, "--bf16"]),
    ("dp 2, precision-aware optimizer", 2, [*DROPOUT, *SPLIT]),
    ("tp 2", 2, [*DROPOUT, "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_resumed_steps_are_bit_equal(corpus, tmp_path, name, world_size, more):
    whole = pretrain(flags_of(corpus, tmp_path / "whole", *more), world_size)
    assert stop_and_resume(flags_of(corpus, tmp_path / "stopped", *more), world_size) == whole


def test_weights_in_two_halves_are_those_of_the_ordinary_optimizer(corpus, tmp_path):
    """They begin alike, and a checkpoint of either is gone on from by the other: all but ties in
    rounding to bf16, of which one weight in 65536 has one in a step."""
    ordinary = [*DISTRIBUTED, "--bf16"]
    whole = pretrain(flags_of(corpus, tmp_path / "whole", *ordinary))
    stopped = flags_of(corpus, tmp_path / "stopped")
    steps = pretrain([*stopped, *SPLIT, "--exit-interval", str(STOP)])
    steps += pretrain([*stopped, *ordinary, "--exit-interval", str(2 * STOP)])
    steps += pretrain([*stopped, *SPLIT])
    for step, expected in zip(steps, whole, strict=True):
        assert step.losses == pytest.approx(expected.losses, rel=1e-4)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


@pytest.mark.parametrize("name, layout", [
    ("tp 2", ["--tensor-model-parallel-size", "2"]),
    ("pp 2", ["--pipeline-model-parallel-size", "2"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_resumed_at_another_layout(corpus, tmp_path, name, layout):
    more = [*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"]
    flags = flags_of(corpus, tmp_path / "run", *more)
    whole = pretrain(flags_of(corpus, tmp_path / "whole", *more), world_size=2)
    pretrain([*flags, "--exit-interval", str(STOP)], world_size=2)
    resumed = pretrain([*flags, *layout], world_size=2)
    for step, expected in zip(resumed, whole[STOP:], strict=True):
        assert step.losses["lm loss"] == pytest.approx(expected.losses["lm loss"], rel=1e-5)
        assert step.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_kill_during_a_save_loses_that_save_only(corpus, tmp_path):
    """Killed when a checkpoint folder has just appeared, at different moments of the save; the
    next start goes on from the checkpoint that the tracker file names. The last one is killed
    while another process writes what the run has begun and left behind."""
    flags = flags_of(corpus, tmp_path, "--save-interval", "2")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for target, delay, more in ((4, 0.0, []), (6, 0.02, []), (8, 0.1, []), (12, 0.0, ASYNC)):
        kill_at_checkpoint([*flags, *more], tmp_path / f"iter_{target:07d}", delay)
        last = int(tracker.read_text())
        # The run looks for the end of an asynchronous save between steps only.
        assert last < target if more else last in (target - 2, target)
    reference = pretrain(flags_of(corpus, tmp_path / "whole"))
    # A copy, because resuming writes over what the killed runs left behind.
    shutil.copytree(tmp_path, tmp_path / "left", ignore=shutil.ignore_patterns("whole", "left"))
    resumed = pretrain(flags_of(corpus, tmp_path / "left", "--save-interval", "2"))
    assert resumed == reference[last:]
    assert tracker.with_name("left").joinpath(tracker.name).read_text() == str(TOTAL)


def kill_at_checkpoint(flags: list[str], folder: Path, delay: float) -> None:
    run = subprocess.Popen(
        [sys.executable, "pretrain_glm.py", *flags], cwd=ROOT, start_new_session=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR":
                          "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder.exists() and any(folder.iterdir())):
        assert run.poll() is None, "the run ended before its checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.002)
    time.sleep(delay)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
