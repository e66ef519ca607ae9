"""Megatron asks torch.cuda which device it is on; without a GPU the answer is the CPU."""

import os
from types import SimpleNamespace

import torch

from patches.patch import Patch, Target, constant


def current_device() -> torch.device:
    """The CPU, as a device: what Megatron does with the answer is to place tensors there."""
    return torch.device("cpu")


def device_count() -> int:
    """Processes on this machine: Megatron maps one process to one device."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def set_device(device: object) -> None:
    """Nothing to choose."""


def synchronize(device: object = None) -> None:
    """Nothing runs beside the program."""


def get_device_properties(device: object = None) -> SimpleNamespace:
    """The fields that Megatron reads; `major` 0 is older than any GPU that it asks about."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=memory, multi_processor_count=os.cpu_count()
    )


def get_device_capability(device: object = None) -> tuple[int, int]:
    """Older than any GPU that Megatron asks about."""
    return 0, 0


def reproduces() -> bool:
    """True where torch.cuda refuses to name a device."""
    try:
        torch.cuda.current_device()
    except (RuntimeError, AssertionError):
        return torch.cuda.device_count() == 0
    return False


PATCH = Patch(
    reason="Megatron places tensors on torch.cuda.current_device() and builds its process groups "
    "only where torch.cuda.device_count() is above 0",
    upstream="not reported",
    versions={"torch": "==2.11.*"},
    when="no GPU",
    targets=(
        Target("torch.cuda:current_device", "6e9804168a5c7f8c", constant(current_device)),
        Target("torch.cuda:device_count", "c7fd457e1134ece0", constant(device_count)),
        Target("torch.cuda:set_device", "86c6d0bf42224be6", constant(set_device)),
        Target("torch.cuda:synchronize", "7055e6143ffee8f1", constant(synchronize)),
        Target(
            "torch.cuda:get_device_properties", "cb006011f5d15cba", constant(get_device_properties)
        ),
        Target(
            "torch.cuda:get_device_capability", "6809539b0a673ba6", constant(get_device_capability)
        ),
    ),
    reproduces=reproduces,
)
