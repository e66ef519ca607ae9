"""Attention needs memory in proportion to the sequence, not to its square."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.attention.peak_memory import BASE_LENGTH, DIM, HEADS

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc for the peak of a process"
)


def peaks(backend, probability, *lengths):
    """Bytes above the baseline at the peak of forward and backward, for each length."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.model.attention.peak_memory", backend, str(probability),
         *map(str, lengths)],
        cwd=ROOT, capture_output=True, text=True, check=True,
        # Fixed: the allocator otherwise raises its threshold and keeps what was freed.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return [int(word) for word in run.stdout.split()]


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_the_default_backend_is_linear_up_to_8192(probability):
    lengths = (2048, 4096, 8192)
    growth = peaks("auto", probability, *lengths)
    per_token = [
        grown / (length - BASE_LENGTH) for grown, length in zip(growth, lengths, strict=True)
    ]
    assert max(per_token) < 1.2 * min(per_token)
    # query, key, value, output and their gradients; as much again covers every temporary.
    assert per_token[-1] < 2 * 8 * HEADS * DIM * 4
    # One byte for each pair of tokens would already be more.
    assert growth[-1] < HEADS * 8192**2


def test_this_measure_sees_a_square():
    at_1024, at_2048 = peaks("reference", 0.0, 1024, 2048)
    assert at_2048 > 3 * at_1024
    assert at_2048 > HEADS * 2048**2 * 4
