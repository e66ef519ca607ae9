"""Megatron takes the kernels of Transformer Engine and Apex wherever these are installed."""

import sys
from typing import Any

from patches.patch import FUSED_KERNELS, Patch, Target


def without_fused_kernels(_: Any) -> dict:
    """The table of imported modules, in which None means: not to be imported."""
    sys.modules.update(dict.fromkeys(FUSED_KERNELS))
    return sys.modules


def reproduces() -> bool:
    """True where Megatron has taken an optimizer that runs on GPUs only."""
    import torch
    from megatron.core import optimizer

    return optimizer.Adam is not torch.optim.AdamW


PATCH = Patch(
    reason="the optimizer, the gradient norm and Megatron's own layers take Transformer Engine or "
    "Apex where they can be imported, and stop at the first kernel",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="no GPU, but Transformer Engine or Apex",
    targets=(Target("sys:modules", "compiled", without_fused_kernels),),
    reproduces=reproduces,
)
