"""Megatron writes device='cuda' into its tensor factories; without a GPU that means the CPU."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from patches.patch import Patch, Target, constant

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """Every torch function that is asked for a CUDA device works on the CPU.

    Holds for the thread that entered it and for those that autograd starts from there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": on_cpu(kwargs["device"])}
        elif func is torch.Tensor.to:
            args = (args[0], *map(on_cpu, args[1:]))
        return func(*args, **kwargs)


def on_cpu(device: Any) -> Any:
    """`device`, or the CPU where it names a CUDA device."""
    names_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return CPU if names_cuda else device


def tensor_cuda(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    """The tensor itself, as Tensor.cuda of a tensor that is there already."""
    return tensor


def module_cuda(module: torch.nn.Module, device: object = None) -> torch.nn.Module:
    """The module itself."""
    return module


def enter_mode(original: type) -> type:
    """Enter the mode for the rest of the process."""
    CudaMeansCpu().__enter__()
    return original


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
        Target("torch:Tensor.cuda", "compiled", constant(tensor_cuda)),
        Target("torch.nn:Module.cuda", "a3f558ba5849fa2c", constant(module_cuda)),
        Target("torch.overrides:TorchFunctionMode", "c65221baa8e5846b", enter_mode),
    ),
    reproduces=reproduces,
)
