"""Prefix attention in one Triton kernel a pass: each block of queries walks what it sees, once.

No host synchronisation, no recompilation for another pack, dropout inside, gradients without
atomics and so the same on every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_glm.model.attention import triton_kernels as kernels
from megatron_glm.model.attention.bounds import Bounds, PerBatch, token_bounds
from megatron_glm.model.dropout import Dropout

LOG2_E = 1.4426950408889634
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Queries and keys of a block, and warps, as large as the registers hold without spilling: the
# asynchronous tensor cores of Hopper read their operands from shared memory and so leave more.
# Chosen by compiling, untimed: `python -m benchmarks.attention` on the machine has the last word.
BLOCKS = {
    "hopper": {
        "forward": (128, 64, 8),
        "backward_queries": (128, 64, 8),
        "backward_keys": (64, 128, 8),
    },
    "other": {
        "forward": (128, 64, 8),
        "backward_queries": (64, 64, 4),
        "backward_keys": (32, 64, 4),
    },
}
ROW_BYTES = 256
"""Bytes of a row of one head for which BLOCKS are meant, as 128 of bf16."""
_bounds = PerBatch(token_bounds)


class Launch(NamedTuple):
    """How a kernel is launched."""

    BLOCK_M: int
    """Queries of a block."""
    BLOCK_N: int
    """Keys of a block."""
    num_warps: int
    num_stages: int


def launch_of(
    kernel: str, dims: int, element_size: int, capability: tuple[int, int], shared_memory: int
) -> Launch:
    """Blocks that fit: as many stages of loads in flight as the shared memory holds, at most 3.

    Args:
        kernel: forward, backward_queries or backward_keys.
        dims: d, rounded up to a power of two.
        element_size: bytes of an element of the query.
        capability: of the GPU, as (9, 0).
        shared_memory: bytes that one program may use.
    """
    row = dims * element_size
    is_hopper = capability[0] == 9 and element_size == 2
    queries, keys, num_warps = BLOCKS["hopper" if is_hopper else "other"][kernel]
    shrink = max(row // ROW_BYTES, 1 if element_size == 2 else 2)
    queries, keys = max(16, queries // shrink), max(16, keys // shrink)
    owned, walked = (keys, queries) if kernel == "backward_keys" else (queries, keys)
    # What stays for the whole walk, and the tile of probabilities between two products.
    held = owned * row * (1 if kernel == "forward" else 2) + queries * keys * element_size
    stages = (shared_memory - held) // (2 * walked * row)
    return Launch(queries, keys, num_warps, max(1, min(3, stages)))


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` by the kernels of `triton_kernels`.

    Raises:
        TypeError: a dtype other than fp32, bf16 or fp16.
    """
    if query.dtype not in DTYPES:
        raise TypeError(f"query has dtype {query.dtype}: must be float32, bfloat16 or float16")
    rate, seed = (0.0, None) if dropout is None else dropout
    return _PrefixAttention.apply(query, key, value, samples, softmax_scale, rate, seed)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, samples, softmax_scale, rate, seed):
        query, key, value = (_dense_heads(x) for x in (query, key, value))
        seq_length, batch, heads, dim = query.shape
        bounds = _bounds(samples, seq_length)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty(batch * heads, seq_length, dtype=torch.float32, device=query.device)
        call = _Call(query, softmax_scale, rate, seed)
        call.launch(
            "forward",
            (query, key, value, out, lse, bounds.key_start, bounds.key_end, call.seed),
            (query, key, value, out),
            (call.scale, call.threshold, call.keep_factor),
        )
        ctx.save_for_backward(query, key, value, out, lse, seed, *bounds)
        ctx.softmax_scale, ctx.rate = softmax_scale, rate
        return out.view(seq_length, batch, heads * dim)

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, out, lse, seed, *bounds = ctx.saved_tensors
        bounds = Bounds(*bounds)
        grad = _dense_heads(grad_out.reshape(out.shape))
        delta = torch.empty_like(lse)
        dq, dk, dv = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        call = _Call(query, ctx.softmax_scale, ctx.rate, seed)
        call.launch_output_dot_gradient(out, grad, delta)
        factors = (call.scale, ctx.softmax_scale, call.threshold, call.keep_factor)
        shared = (query, key, value, grad, lse, delta)
        call.launch(
            "backward_queries",
            (*shared, dq, bounds.key_start, bounds.key_end, call.seed),
            (query, key, value, grad, dq),
            factors,
        )
        call.launch(
            "backward_keys",
            (*shared, dk, dv, bounds.query_start, bounds.query_end, call.seed),
            (query, key, value, grad, dk, dv),
            factors,
        )
        return dq, dk, dv, None, None, None, None


class _Call:
    """What the kernels of one attention have in common."""

    def __init__(self, query: Tensor, softmax_scale: float, rate: float, seed: Tensor | None):
        self.seq_length, batch, self.num_heads, self.dim = query.shape
        self.pairs = batch * self.num_heads
        self.dims = max(16, 1 << (self.dim - 1).bit_length())
        self.element_size = query.element_size()
        self.device = query.device
        self.scale = softmax_scale * LOG2_E
        self.has_dropout = seed is not None
        # Some tensor must stand for the seed that a kernel without dropout never reads.
        self.seed = seed if self.has_dropout else query
        dropout = Dropout(rate, self.seed)
        self.threshold = dropout.threshold if self.has_dropout else 0
        self.keep_factor = 1.0 / dropout.keep_probability
        self.precision = "ieee" if query.dtype == torch.float32 else "tf32"

    def launch(self, name: str, pointers: tuple, strided: tuple, factors: tuple) -> None:
        """Run one of the kernels of BLOCKS over all blocks of what it owns."""
        launch = launch_of(name, self.dims, self.element_size, *_limits(self.device))
        owned = launch.BLOCK_N if name == "backward_keys" else launch.BLOCK_M
        getattr(kernels, name)[(-(-self.seq_length // owned), self.pairs)](
            *pointers,
            *(stride for x in strided for stride in x.stride()[:3]),
            self.seq_length, self.num_heads, *factors,
            HEAD_DIM=self.dim, DIMS=self.dims, DROPOUT=self.has_dropout, PRECISION=self.precision,
            **launch._asdict(),
        )

    def launch_output_dot_gradient(self, out: Tensor, grad: Tensor, delta: Tensor) -> None:
        """Fill `delta` for the backward kernels."""
        block = 64
        kernels.output_dot_gradient[(-(-self.seq_length // block), self.pairs)](
            out, grad, delta, *out.stride()[:3], *grad.stride()[:3],
            self.seq_length, self.num_heads, HEAD_DIM=self.dim, DIMS=self.dims, BLOCK=block,
        )


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Capability and bytes of shared memory a program; those of a small GPU where there is none."""
    if device.type != "cuda":
        return (7, 5), 64 * 1024
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin
