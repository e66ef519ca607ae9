"""tools/compare_baseline.py passes only a run that is better in every objective."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import compare_baseline

TOOL = Path(compare_baseline.__file__)
BASELINE = {"[MASK]": 5.0, "[gMASK]": 6.0}


@pytest.mark.parametrize(
    "last, is_better",
    [
        ({"[MASK]": 4.9, "[gMASK]": 5.9, "": 7.0}, True),
        ({"[MASK]": 4.9, "[gMASK]": 6.0}, False),
        ({"[MASK]": 4.9}, False),
        ({"[MASK]": float("nan"), "[gMASK]": 5.9}, False),
    ],
)
def test_better_means_below_in_every_objective(last, is_better):
    assert compare_baseline.compare(last, BASELINE)[1] is is_better


@pytest.mark.parametrize("loss, status", [(5.5, 0), (6.5, 1)])
def test_the_last_evaluation_decides(tmp_path, loss, status):
    log, baseline = tmp_path / "train.log", tmp_path / "baseline.json"
    log.write_text(
        "".join(
            f" validation loss at iteration {step} | lm loss [MASK] value: 4.5 |"
            f" lm loss [gMASK] value: {value} |\n"
            for step, value in ((10, 6.2), (20, loss))
        )
    )
    baseline.write_text(json.dumps(BASELINE))
    command = [sys.executable, TOOL, log, "--baseline", baseline]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert "6.000" in result.stdout and f"{loss:.3f}" in result.stdout
