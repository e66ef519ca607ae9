"""Every test runs with the patches applied and one thread a process."""

import os

# Before torch is imported: it reads the number of threads then.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import pytest
import torch

import patches

patches.apply()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Processes for `make test`, of 2 GB each; on a GPU, whose memory tests measure, only this."""
    return 0 if torch.cuda.is_available() else min(os.cpu_count(), 4)


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        # FlexAttention is compiled for more shapes and types by all tests together than by a run.
        torch._dynamo.config.recompile_limit = 100
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is false")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
