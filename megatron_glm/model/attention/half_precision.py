"""What the libraries' kernels for half precision can take."""

import torch
from torch import Tensor

from megatron_glm.errors import GLMError

DTYPES = (torch.bfloat16, torch.float16)
MAX_DIM = 128


def require_half_precision(backend: str, query: Tensor) -> None:
    """Check the query [..., d] for a backend.

    Raises:
        GLMError: a dtype outside DTYPES, a head dimension d that is not a multiple of 8 up to
            MAX_DIM.
    """
    if query.dtype not in DTYPES:
        raise GLMError(
            f"--glm-attention-backend {backend}: works in bf16 and fp16, not in {query.dtype}; "
            "pass --bf16 or --fp16, or take another backend"
        )
    if query.shape[-1] % 8 or query.shape[-1] > MAX_DIM:
        raise GLMError(
            f"--glm-attention-backend {backend}: head dimension {query.shape[-1]} must be a "
            f"multiple of 8 up to {MAX_DIM}; take another backend"
        )
