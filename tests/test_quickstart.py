"""examples/quickstart.sh runs from text to filled blanks, and judges its own result honestly."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# A minute where nothing else runs: every stage starts a process that imports torch or Megatron.
pytestmark = pytest.mark.timeout(600)


def run(work, **settings):
    """Runs a quickstart of few steps on little text: one package's documentation."""
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "QUICKSTART_STEPS": "40",
        "QUICKSTART_VOCAB_SIZE": "512",
        "QUICKSTART_ROOTS": str(Path(np.__file__).parent),
        **settings,
    }
    command = [ROOT / "examples/quickstart.sh", work]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=580)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    work = tmp_path_factory.mktemp("quickstart") / "work"
    return work, run(work)


def test_it_trains_stops_and_resumes(quickstart):
    work, result = quickstart
    assert "saved after step 20" in result.stdout, result.stdout + result.stderr
    assert "resumed after step 20" in result.stdout
    assert (work / "checkpoint/latest_checkpointed_iteration.txt").read_text() == "40"


def test_it_ends_by_naming_files_that_exist(quickstart):
    work, result = quickstart
    named = re.findall(r"^(?:checkpoint|log|loss plot) +(\S+)$", result.stdout, re.MULTILINE)
    assert [Path(name).exists() for name in named] == [True] * 3
    assert (work / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_it_fills_three_blanks(quickstart):
    work, result = quickstart
    blanks = (work / "blanks.txt").read_text()
    assert blanks.count("⟦") == blanks.count("⟧") == 3
    assert all(f"  {line}\n" in result.stdout for line in blanks.splitlines())


def test_its_exit_status_is_whether_both_held_out_losses_are_below_the_unigram_models(quickstart):
    work, result = quickstart
    lines = [line for line in (work / "train.log").read_text().splitlines() if "validation" in line]
    losses = dict(re.findall(r"lm loss (\[g?MASK\]) value: (\S+)", lines[-1]))
    baseline = json.loads((work / "baseline.json").read_text())
    assert losses.keys() == baseline.keys() == {"[MASK]", "[gMASK]"}
    is_better = all(float(losses[name]) < baseline[name] for name in baseline)
    assert result.returncode == (0 if is_better else 1)


def test_a_run_that_ended_before_that_was_noted_is_evaluated_and_not_trained(quickstart):
    work, first = quickstart
    for stage in ("first_half", "second_half"):
        (work / "done" / stage).unlink()
    again = run(work)
    assert again.returncode == first.returncode, again.stdout + again.stderr
    assert "held-out loss after step 40" in again.stdout
    assert "saved after step" not in again.stdout and "/40 " not in again.stdout


def test_a_second_call_does_nothing_again(quickstart):
    work, first = quickstart
    log = (work / "train.log").read_bytes()
    second = run(work)
    assert second.returncode == first.returncode
    assert second.stdout.count("(done before)") == 8
    assert (work / "train.log").read_bytes() == log


def test_a_folder_with_other_settings_is_refused(quickstart):
    work, _ = quickstart
    result = run(work, QUICKSTART_VOCAB_SIZE="1024")
    assert result.returncode == 2 and str(work) in result.stderr
