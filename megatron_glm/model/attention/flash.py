"""Prefix attention by FlashAttention-4: a kernel a pass that skips what nothing sees.

For Hopper and Blackwell, where it uses instructions that neither Triton nor FlexAttention reach,
without dropout. It is compiled once for a dtype and head dimension, whatever lengths and packs.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.bounds import PerBatch
from megatron_glm.model.attention.half_precision import require_half_precision

if TYPE_CHECKING:
    from megatron_glm.model.attention.flash_kernels import Mask

# By its bare name pip would take a placeholder: all of its releases are preliminary.
INSTALL = "pip install 'flash-attn-4>=4.0.0b36'"

MAJORS = (9, 10, 11)
"""Compute capabilities of Hopper and of Blackwell in data centres; of 12, Blackwell's for graphics,
it has no backward pass under a mask."""


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` in half precision on a GPU of MAJORS.

    Raises:
        GLMError: dropout, --deterministic-mode, a dtype other than bf16 or fp16, a head dimension
            that is not a multiple of 8 up to 128, another GPU, FlashAttention-4 is not installed.
    """
    require_half_precision("flash", query)
    if dropout is not None:
        raise _error("has no dropout; pass --attention-dropout 0 or take another backend")
    if torch.are_deterministic_algorithms_enabled():
        raise _error("sums gradients in any order; drop --deterministic-mode or change the backend")
    return _PrefixAttention.apply(query, key, value, samples, softmax_scale)


@cache
def _kernels():
    major, minor = torch.cuda.get_device_capability()
    if major not in MAJORS:
        raise _error(
            f"needs a GPU of compute capability 9, 10 or 11, this one has {major}.{minor}; take "
            "another backend"
        )
    try:
        return import_module(f"{__package__}.flash_kernels")
    except ImportError as error:
        raise _error(f"needs FlashAttention-4 ({error}); {INSTALL}") from error


def _error(reason: str) -> GLMError:
    return GLMError(f"--glm-attention-backend flash: {reason}")


_mask: "Callable[[Tensor, int], Mask]" = PerBatch(
    lambda samples, seq_length: _kernels().make_mask(samples, seq_length)
)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, samples, softmax_scale):
        mask = _mask(samples, query.shape[0])
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        of_sequences = (x.transpose(0, 1) for x in (query, key, value, out))
        lse = _kernels().forward(*of_sequences, mask, softmax_scale)
        ctx.save_for_backward(query, key, value, out, lse, samples)
        ctx.softmax_scale = softmax_scale
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *inputs, out, lse, samples = ctx.saved_tensors
        mask = _mask(samples, out.shape[0])
        gradients = [torch.empty_like(out) for _ in inputs]
        q, k, v, o, g, dq, dk, dv = (
            x.transpose(0, 1) for x in (*inputs, out, grad.reshape(out.shape), *gradients)
        )
        _kernels().backward((q, k, v), o, lse, g, (dq, dk, dv), mask, ctx.softmax_scale)
        return *gradients, None, None
