"""Kernels under Triton's interpreter, which runs them on a CPU: every file interpreted_*.py.

Each in a process of its own: whether kernels are compiled or interpreted is settled when Triton is
imported, by tests/model/attention/interpreter.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/interpreted_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_results_under_the_interpreter(file):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", file],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
