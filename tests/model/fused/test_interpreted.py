"""The fused kernels under Triton's interpreter: every file of this folder named interpreted_*.py.

Each in a process of its own: whether kernels are compiled or interpreted is settled when Triton is
imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("interpreted_*.py")))
def test_results_under_the_interpreter(name):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
         str(FOLDER / name)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
