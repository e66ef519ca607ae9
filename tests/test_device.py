"""A GPU that cannot be used is an error, not a slow run."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megatron_glm import device
from megatron_glm.errors import GLMError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with these device files, where torch can use a GPU or says why not."""

    def make(*files, is_usable=False, reason=None):
        for file in files:
            (tmp_path / file).touch()

        def is_available():
            if reason:
                warnings.warn(reason, UserWarning, stacklevel=1)
            return is_usable

        monkeypatch.setattr(device, "DEVICE_FILES", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


def test_a_gpu_that_torch_can_use(machine):
    machine("nvidia0", "nvidiactl", is_usable=True)
    assert device.has_gpu()


def test_a_machine_without_one(machine):
    machine("null", "nvidiactl")
    assert not device.has_gpu()


def test_one_that_torch_cannot_use_is_an_error_with_the_reason(machine):
    machine("nvidia0", reason="CUDA initialization: The NVIDIA driver\nis too old")
    with pytest.raises(GLMError, match=r"cannot use \(CUDA initialization: The NVIDIA driver is"):
        device.has_gpu()


def test_one_that_is_hidden_on_purpose(machine, monkeypatch):
    machine("nvidia0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.has_gpu()


def test_kernels_start_in_the_order_of_their_launch_where_a_run_first_asks_for_a_gpu():
    """CUDA has started then, and whoever sets the variable later sets it in vain."""
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    program = (
        "import os, sys, torch\n"
        f"torch.cuda.is_available = lambda: sys.exit(os.environ.get('{variable}', 'unset'))\n"
        "import pretrain_glm"
    )
    environment = {name: value for name, value in os.environ.items() if name != variable}
    asked = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1],
                           env=environment, capture_output=True, text=True)  # fmt: skip
    assert asked.stderr.strip() == "1"
