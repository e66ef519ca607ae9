"""Twelve layers train in fp16 with the dynamic loss scale and skip no step.

GLM_FP16_STEPS sets how many steps are taken (20; the acceptance run is 500).
"""

import json
import os

import pytest

from benchmarks import half_precision

NUM_STEPS = int(os.environ.get("GLM_FP16_STEPS", "20"))


def test_a_skipped_step_and_another_loss_are_judged():
    good = [{"dtype": "fp16", "skipped_after": 0, "last_loss": 2.0},
            {"dtype": "fp32", "skipped_after": 0, "last_loss": 2.0}]
    assert all(check.passed for check in half_precision.judge(good))
    bad = [{"dtype": "fp16", "skipped_after": 1, "last_loss": 2.1}, good[1]]
    assert not any(check.passed for check in half_precision.judge(bad))
    failed = [{"dtype": "fp16", "error": "no room"}, good[1]]
    (check,) = half_precision.judge(failed)
    assert check.passed is None and check.why == "no room"


@pytest.mark.timeout(60 + 3 * NUM_STEPS)
def test_no_step_is_skipped(tmp_path):
    half_precision.main(["--steps", str(NUM_STEPS), "--dtypes", "fp16", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("half_precision-*.json")
    record = json.loads(path.read_text())
    (row,) = record["rows"]
    assert "error" not in row, row
    assert row["steps"] == NUM_STEPS and row["last_loss"] < row["first_loss"]
    assert row["skipped_in_warm_up"] == row["skipped_after"] == 0
