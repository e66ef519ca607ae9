"""Megatron writes device='cuda' into its tensor factories; without a GPU that means the CPU."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils import _device

from patches.patch import Patch, Target, constant

CPU = torch.device("cpu")
FACTORIES = (
    *("tensor", "as_tensor", "arange", "empty", "full", "ones", "zeros"),
    *("rand", "randint", "randn", "empty_like", "full_like", "ones_like", "zeros_like"),
)


def on_cpu(device: Any) -> Any:
    """`device`, or the CPU where it names a CUDA device."""
    names_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return CPU if names_cuda else device


def making_on_cpu(factory: Callable) -> Callable:
    """The factory, which takes a CUDA device for the CPU.

    A TorchFunctionMode would do the same for all of torch, at 5 us for each of its calls.
    """
    # `with torch.device("meta")` looks factories up in this set, which is made once: the ones that
    # it will see are the originals.
    _device._device_constructors()

    @wraps(factory)
    def make(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None:
            return factory(*args, **kwargs)
        return factory(*args, device=on_cpu(device), **kwargs)

    return make


def moving_to_cpu(to: Callable) -> Callable:
    """Tensor.to, which takes a CUDA device for the CPU."""

    @wraps(to)
    def move(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        return to(tensor, *map(on_cpu, args), **kwargs)

    return move


def cuda(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """The tensor itself, as Tensor.cuda of a tensor that is there already."""
    return tensor


def reproduces() -> bool:
    """True where a tensor cannot be made with device='cuda'."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError):
        return True
    return False


PATCH = Patch(
    reason="some 150 places in Megatron name the device 'cuda' in a tensor factory, .to() or "
    ".cuda()",
    upstream="not reported",
    versions={"torch": "==2.11.*"},
    when="no GPU",
    targets=(
        *(Target(f"torch:{factory}", "compiled", making_on_cpu) for factory in FACTORIES),
        Target("torch:Tensor.to", "compiled", moving_to_cpu),
        Target("torch:Tensor.cuda", "compiled", constant(cuda)),
    ),
    reproduces=reproduces,
)
