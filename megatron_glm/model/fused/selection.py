"""Where the fused kernels run."""

from functools import cache

import torch
from torch import Tensor

from megatron_glm.model.config import GLMArchitecture

DEVICES = ("cuda",)
"""Types of device for which Triton compiles."""


def uses_kernels(config: GLMArchitecture, x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel rather than as torch's operations."""
    return config.glm_fused_kernels and x.device.type in DEVICES


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU, 1 where there is none."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
