"""tools/plan_run.py: the same flags as training, figures first, errors of one line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools import plan_run

ROOT = Path(__file__).parents[2]
MODEL = ["--glm-preset", "335m", "--padded-vocab-size", "50304", "--bf16"]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the tool here and gives what it prints; the error where it ends in one."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")  # put back at the end

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["plan_run.py", *map(str, flags)])
        try:
            plan_run.main()
        except SystemExit as stop:
            assert stop.code == 2
            return capsys.readouterr().err.strip().splitlines()[-1]
        return capsys.readouterr().out

    return run


def test_the_example_is_planned_as_the_paper_trained_it(tmp_path):
    result = subprocess.run(
        [ROOT / "examples" / "pretrain_glm_130b.sh", "--json", tmp_path / "plan.json",
         "--plot", tmp_path / "plan.png"],
        env=os.environ | {"PLAN": "1", "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("128.7B parameters on 96 x 8 A100-40G: TP 4 x PP 8 x DP 24")
    assert "of 39.4 GiB" in lines[1]
    (stored,) = json.loads((tmp_path / "plan.json").read_text())
    assert stored["parameters"] == 128_697_794_560
    assert [stage["parameters"] // 2 for stage in stored["memory"]][0] >= 4_087_095_296
    assert stored["job"]["dtype"] == "fp16"
    assert not stored["job"]["accumulate_allreduce_grads_in_fp32"]
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_search_ends_in_flags_that_plan_the_same(tmp_path, plan):
    common = [*MODEL, "--gpu", "H100", "--nodes", "2", "--global-batch-size", "512",
              "--train-tokens", "1e11"]  # fmt: skip
    lines = plan(*common, "--search", "--json", tmp_path / "found.json").splitlines()
    flags = shlex.split(lines[lines.index("flags of the first:") + 1])
    assert "16 GPUs" not in plan(*common, *flags, "--json", tmp_path / "again.json")
    first = json.loads((tmp_path / "found.json").read_text())[0]
    (second,) = json.loads((tmp_path / "again.json").read_text())
    assert first == second


def test_what_was_measured_is_taken_as_it_is(tmp_path, plan):
    def seconds(*flags):
        plan(*MODEL, "--micro-batch-size", "8", "--tensor-model-parallel-size", "2",
             "--json", tmp_path / "plan.json", *flags)  # fmt: skip
        return json.loads((tmp_path / "plan.json").read_text())[0]["seconds"]

    usual = seconds()
    rates = {"--product-tflops": 0.88 * 766 / 2, "--memory-tb-s": 0.88 * 4.8 / 2,
             "--attention-share": 0.15, "--nvlink-gb-s": 0.8 * 450 / 2}  # fmt: skip
    halved = seconds(*(word for rate in rates.items() for word in rate))
    for kind in ("matrix products", "memory-bound", "attention", "tensor parallel links"):
        assert halved[kind] == pytest.approx(2 * usual[kind]), kind


@pytest.mark.parametrize(
    "flags, error",
    [
        ((*MODEL, "--gpu", "T4"), "--gpu T4: unknown; use one of A100-40G"),
        ((*MODEL, "--nodes", "0"), "--nodes 0 x --gpus-per-node 8: must be 1 or more"),
        ((*MODEL, "--swiglu"), "--swiglu"),
        ((*MODEL, "--plot", "plan.xyz"), "--plot plan.xyz: must end in"),
        ((*MODEL, "--search"), "--global-batch-size is missing: a search needs it"),
        (("--glm-preset", "335m"), "--padded-vocab-size is missing: give it, or --tokenizer-type"),
        ((*MODEL, "--mlp-chunks-for-training", "2"),
         "--mlp-chunks-for-training 2: not forecast; plan without it"),
        ((*MODEL, "--recompute-granularity", "selective", "--recompute-modules", "moe_act"),
         "--recompute-modules moe_act: "),
    ],
)  # fmt: skip
def test_errors_are_one_line_with_the_cure(plan, flags, error):
    assert plan(*flags).startswith(f"plan_run.py: error: {error}")
