"""Bias and rotary positions applied where queries, keys and values lie: no copy is made or kept.

Forward, one kernel adds the bias of the mixed projection inside its output, which the linear does
not need again, and turns queries and keys; attention then reads three views of it. Backward, one
kernel turns the gradients back as it writes them, with the value's, into the gradient of the
projection, and sums them up for the bias. Either reads and writes query, key and value once.
Products and sums are in fp32, by the fp32 rotation, and rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_glm.model.fused.selection import num_processors

# Chosen by compiling, untimed: `python -m benchmarks.fused` on the machine has the last word.
TILE = 1024
"""Elements of a tile, halves of heads of tokens: 16 bytes of a 16-bit type for each thread."""
TOKENS = 4
"""Tokens of a tile: more of them share a bias and its sums, fewer leave more heads to share a
rotation."""
NUM_WARPS = 4
PROGRAMS_PER_PROCESSOR = 4
"""Programs of the backward pass for which a multiprocessor of a GPU has registers."""


def rotate_query_key_(
    mixed: Tensor, bias: Tensor | None, rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [s, b, n, d] as views of `mixed`, to which the bias has now been added
    and in which query and key have turned.

    mixed: [s, b, n, 3d], per head [q, k, v], on a GPU. It is overwritten: whoever saved it for a
    backward gets autograd's error there. bias: [n * 3d] of its dtype, or None where it has been
    added. rotation: fp32 [s, b, 1, d] as `RotaryTable` gives it. The results must not be changed
    in place, which autograd refuses.
    """
    return _RotateQueryKey.apply(mixed, bias, rotation)


class _RotateQueryKey(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed, bias, rotation):
        # Detached, because autograd has a returned input as one output only.
        mixed = mixed.detach().contiguous()
        rotation = rotation.contiguous()
        seq_length, batch, heads, triple = mixed.shape
        tokens = seq_length * batch
        grid, constants = _launch(tokens, heads, triple // 3)
        ctx.has_bias = bias is not None
        # Where there is no bias, mixed stands: a pointer that the kernel does not read.
        bias = bias if ctx.has_bias else mixed
        rotate_forward[grid](mixed, bias, rotation, tokens, heads, BIAS=ctx.has_bias, **constants)
        torch.autograd.graph.increment_version(mixed)
        ctx.save_for_backward(rotation)
        return mixed.chunk(3, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (rotation,) = ctx.saved_tensors
        grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        seq_length, batch, heads, dim = grads[0].shape
        tokens = seq_length * batch
        mixed = grads[0].new_empty(seq_length, batch, heads, 3 * dim)
        (blocks, head_blocks), constants = _launch(tokens, heads, dim)
        at_a_time = PROGRAMS_PER_PROCESSOR * num_processors(mixed.device)
        programs = min(blocks, triton.cdiv(at_a_time, head_blocks))
        width = heads * 3 * dim if ctx.has_bias else 0
        sums = mixed.new_empty(programs, width, dtype=torch.float32)
        strides = [stride for grad in grads for stride in grad.stride()[:3]]
        rotate_backward[programs, head_blocks](
            *grads, mixed, rotation, sums, *strides, batch, tokens, heads,
            BIAS=ctx.has_bias, **constants,
        )  # fmt: skip
        dbias = sums.sum(0).to(mixed.dtype) if ctx.has_bias else None
        return mixed, dbias, None


def _launch(tokens: int, heads: int, dim: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Blocks of tokens and of heads, and the constants of either kernel."""
    halves = triton.next_power_of_2(dim // 2)
    block = min(max(1, TILE // (TOKENS * halves)), triton.next_power_of_2(heads))
    constants = {"HALF": dim // 2, "HALVES": halves, "HEADS": block, "TOKENS": TOKENS,
                 "num_warps": NUM_WARPS}  # fmt: skip
    return (triton.cdiv(tokens, TOKENS), triton.cdiv(heads, block)), constants


@triton.jit
def rotate_forward(
    mixed_pointer, bias_pointer, rotation_pointer, num_tokens, num_heads, BIAS: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):
    """Adds the bias to some heads of some tokens and turns their query and key, in place; grid
    (blocks of tokens, blocks of heads)."""
    heads, dims, inside = _heads(num_heads, HALF, HALVES, HEADS)
    tokens = _tokens(tl.program_id(0) * TOKENS, TOKENS)
    mask = inside & (tokens < num_tokens)
    cos, sin = _load(rotation_pointer + tokens * 2 * HALF + dims, mask, HALF)
    mixed_pointer += (tokens * num_heads + heads) * 6 * HALF + dims
    bias_pointer += heads * 6 * HALF + dims
    for part in tl.static_range(3 if BIAS else 2):
        first, second = _load(mixed_pointer + part * 2 * HALF, mask, HALF)
        if BIAS:
            first_bias, second_bias = _load(bias_pointer + part * 2 * HALF, mask, HALF)
            first += first_bias
            second += second_bias
        if part < 2:
            first, second = _turn(first, second, cos, sin)
        _store(mixed_pointer + part * 2 * HALF, first, second, mask, HALF)


@triton.jit
def rotate_backward(
    q_pointer, k_pointer, v_pointer, mixed_pointer, rotation_pointer, sums_pointer,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, batch, num_tokens, num_heads, BIAS: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):
    """Gradient of the mixed projection from those of query, key and value and, summed over every
    so many blocks of tokens, that of the bias: sums [programs, n * 3d]; grid (programs, blocks of
    heads)."""
    heads, dims, inside = _heads(num_heads, HALF, HALVES, HEADS)
    zeros = tl.zeros((TOKENS, HEADS, HALVES), dtype=tl.float32)
    q_sums, k_sums, v_sums = (zeros, zeros), (zeros, zeros), (zeros, zeros)
    begin, step = tl.program_id(0) * TOKENS, tl.num_programs(0) * TOKENS
    for start in range(begin, num_tokens, step):
        tokens = _tokens(start, TOKENS)
        mask = inside & (tokens < num_tokens)
        cos, sin = _load(rotation_pointer + tokens * 2 * HALF + dims, mask, HALF)
        row, column = tokens // batch, tokens % batch
        q = _load(q_pointer + row * q_s + column * q_b + heads * q_n + dims, mask, HALF)
        k = _load(k_pointer + row * k_s + column * k_b + heads * k_n + dims, mask, HALF)
        v = _load(v_pointer + row * v_s + column * v_b + heads * v_n + dims, mask, HALF)
        q, k = _turn(q[0], q[1], cos, -sin), _turn(k[0], k[1], cos, -sin)
        target = mixed_pointer + (tokens * num_heads + heads) * 6 * HALF + dims
        _store(target, q[0], q[1], mask, HALF)
        _store(target + 2 * HALF, k[0], k[1], mask, HALF)
        _store(target + 4 * HALF, v[0], v[1], mask, HALF)
        q_sums = q_sums[0] + q[0], q_sums[1] + q[1]
        k_sums = k_sums[0] + k[0], k_sums[1] + k[1]
        v_sums = v_sums[0] + v[0], v_sums[1] + v[1]
    if BIAS:
        sums_pointer += (tl.program_id(0) * num_heads + heads) * 6 * HALF + dims
        _store_sums(sums_pointer, q_sums, inside, HALF)
        _store_sums(sums_pointer + 2 * HALF, k_sums, inside, HALF)
        _store_sums(sums_pointer + 4 * HALF, v_sums, inside, HALF)


@triton.jit
def _heads(num_heads, HALF: tl.constexpr, HALVES: tl.constexpr, HEADS: tl.constexpr):
    """Heads [1, HEADS, 1], dimensions [1, 1, HALVES] of half a head, and which of them exist."""
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[None, :, None]
    dims = tl.arange(0, HALVES)[None, None, :]
    return heads, dims, (heads < num_heads) & (dims < HALF)


@triton.jit
def _tokens(start, TOKENS: tl.constexpr):
    """Tokens [TOKENS, 1, 1]."""
    return (start + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]


@triton.jit
def _turn(first, second, cos, sin):
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _load(source, mask, HALF: tl.constexpr):
    """Both halves, fp32 of the shape of `mask`."""
    # Loaded at its own size, what several heads or tokens share would reach them by shared memory.
    source = tl.broadcast_to(source, mask.shape)
    first = tl.load(source, mask=mask, other=0.0)
    second = tl.load(source + HALF, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store(target, first, second, mask, HALF: tl.constexpr):
    dtype = target.dtype.element_ty
    tl.store(target, first.to(dtype), mask=mask)
    tl.store(target + HALF, second.to(dtype), mask=mask)


@triton.jit
def _store_sums(target, sums, mask, HALF: tl.constexpr):
    first, second = tl.sum(sums[0], 0, keep_dims=True), tl.sum(sums[1], 0, keep_dims=True)
    _store(target, first, second, mask, HALF)
