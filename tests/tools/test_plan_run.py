"""tools/plan_run.py: the same flags as training, figures first, errors of one line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODEL = ["--glm-preset", "335m", "--padded-vocab-size", "50304", "--bf16"]


def plan(*flags):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "plan_run.py", *flags],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def last_line(result):
    assert result.returncode == 2
    return result.stderr.strip().splitlines()[-1]


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


def test_a_search_ends_in_flags_that_plan_the_same(tmp_path):
    common = [*MODEL, "--gpu", "H100", "--nodes", "2", "--global-batch-size", "512",
              "--train-tokens", "1e11"]  # fmt: skip
    found = plan(*common, "--search", "--json", tmp_path / "found.json")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    flags = shlex.split(lines[lines.index("flags of the first:") + 1])
    again = plan(*common, *flags, "--json", tmp_path / "again.json")
    assert again.returncode == 0, again.stderr
    first = json.loads((tmp_path / "found.json").read_text())[0]
    (second,) = json.loads((tmp_path / "again.json").read_text())
    assert first == second


def test_errors_are_one_line_with_the_cure():
    assert "--gpu T4: unknown; use one of" in last_line(plan(*MODEL, "--gpu", "T4"))
    missing = plan("--glm-preset", "335m", "--micro-batch-size", "1")
    assert last_line(missing) == (
        "plan_run.py: error: --padded-vocab-size is missing: give it, or --tokenizer-type and "
        "--tokenizer-model"
    )
    assert "--global-batch-size is missing" in last_line(plan(*MODEL, "--search"))
