"""A GPU that cannot be used is an error, not a slow run."""

import warnings

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
