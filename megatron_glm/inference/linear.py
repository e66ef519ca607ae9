"""Linear layers by the form of their weights."""

from typing import Protocol

import torch
import torch.nn.functional as F


class Linear(Protocol):
    """x [t, in] @ weight.T + bias: [t, out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class PlainLinear:
    """weight [out, in] in the type of x; bias [out], or None where it is added elsewhere."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.weight, self.bias = weight, bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)
