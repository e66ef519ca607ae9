"""Where the fused kernels run."""

from torch import Tensor

from megatron_glm.model.config import GLMArchitecture

DEVICES = ("cuda",)
"""Types of device for which Triton compiles."""


def uses_kernels(config: GLMArchitecture, x: Tensor) -> bool:
    """Whether an operation on `x` runs as a Triton kernel rather than as torch's operations."""
    return config.glm_fused_kernels and x.device.type in DEVICES
