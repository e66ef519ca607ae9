"""The benchmark of weight gradients and the optimizer measures all forms and leaves a record."""

import json

import pytest

from benchmarks import update


def test_a_run_leaves_a_record(tmp_path, capsys):
    update.main(["--device", "cpu", "--repeats", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("update-*.json")
    copy, *gradients, step = json.loads(path.read_text())["rows"]
    assert copy["gb_per_s"] > 0
    assert [row["operation"] for row in gradients] == [
        f"gradient of linear_{name}" for name in ("qkv", "proj", "fc1", "fc2")
    ]
    # 2 layers of 4 matrices, each with a bias and a norm's two weights.
    assert step["operation"] == "step of 32 weights"
    for row in (*gradients, step):
        assert row["speed_up"] == pytest.approx(row["unfused_ms"] / row["fused_ms"])
    assert step["speed_up_of_halves"] == pytest.approx(step["fused_ms"] / step["halves_ms"])
    assert capsys.readouterr().out.count("| small |") == 5


def test_a_slower_form_is_judged():
    row = {"size": "4096", "operation": "step of 32 weights", "speed_up": 0.9,
           "speed_up_of_halves": 1.2}  # fmt: skip
    fused, halves = update.judge([{"size": "", "operation": "copy"}, row])
    assert not fused.passed and halves.passed
