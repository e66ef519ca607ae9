"""GLM-130B's own configuration, built stage by stage without data, weights or GPUs."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDDEN, FFN, LAYERS, VOCABULARY = 12288, 32768, 70, 150528


def dry_run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [ROOT / "examples" / "pretrain_glm_130b.sh", *flags],
        env=os.environ | {"DRY_RUN": "1", "PYTHON": sys.executable},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def parameters_by_hand() -> int:
    """Matrices, biases and norms of the paper's architecture, counted from its dimensions."""
    attention = 4 * HIDDEN * HIDDEN + 4 * HIDDEN
    feed_forward = 3 * HIDDEN * FFN + 2 * FFN + HIDDEN
    norms = 2 * 2 * HIDDEN
    return VOCABULARY * HIDDEN + LAYERS * (attention + feed_forward + norms) + 2 * HIDDEN


def test_the_example_builds_130b_parameters():
    result = dry_run()
    assert result.returncode == 0, result.stderr
    assert "768 ranks: TP 4 x PP 8 x DP 24" in result.stdout
    layers = [int(row[1]) for row in re.findall(r"^ +(\d) +(\d+) ", result.stdout, re.M)]
    assert layers == [8, 9, 9, 9, 9, 9, 9, 8]
    assert f"{parameters_by_hand():,} parameters in all (128.7B)" in result.stdout


def test_the_number_of_parameters_does_not_depend_on_the_layout_or_the_linears():
    result = dry_run(
        "--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4",
        "--decoder-first-pipeline-num-layers", "17", "--decoder-last-pipeline-num-layers", "17",
        "--transformer-impl", "transformer_engine",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{parameters_by_hand():,} parameters in all" in result.stdout


def test_a_refused_flag_stops_it_with_one_line():
    result = dry_run("--swiglu")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("dry_run.py: error: --swiglu")
