"""GeGLU with its bias, gelu(x1 + b1) * (x2 + b2) with the exact GELU, as one pass each way.

In units of one [s, b, f] tensor in memory: 3 forward and 5 backward, the gradient of the bias among
them, where torch's operations have 9 and 15. The backward pass needs x and the bias alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Chosen by compiling, untimed: `python -m benchmarks.fused` on the machine has the last word.
TILE = {"ROWS": 8, "COLUMNS": 128, "STAGES": 3, "num_warps": 4}
"""Rows and columns of a tile, tiles whose loads are in flight, and warps."""
ROWS_OF_PROGRAM = 64
"""Rows of which a program takes one tile after the other and adds up the gradient of the bias."""
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)
# exp2(EXPONENT * x * x) is exp(-x * x / 2).
EXPONENT = tl.constexpr(-0.7213475204444817)


def bias_geglu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x1 + b1) * (x2 + b2), [..., f] of the dtype of x; arithmetic in fp32.

    x: [..., 2f], x1 before x2, in fp32, bf16 or fp16 on a GPU. bias: [2f], b1 before b2.
    """
    return _BiasGeglu.apply(x, bias)


class _BiasGeglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        grid, rows, constants = _launch(out)
        geglu_forward[grid](x, bias, out, rows, **constants)
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad, dx = grad.contiguous(), torch.empty_like(x)
        grid, rows, constants = _launch(grad)
        sums = torch.empty(grid[0], x.shape[-1], dtype=torch.float32, device=x.device)
        geglu_backward[grid](grad, x, bias, dx, sums, rows, **constants)
        return dx, sums.sum(0).to(bias.dtype)


def _launch(out: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid, rows and constants of either kernel for an output [..., f]."""
    width = out.shape[-1]
    rows = out.numel() // width
    grid = triton.cdiv(rows, ROWS_OF_PROGRAM), triton.cdiv(width, TILE["COLUMNS"])
    return grid, rows, {"WIDTH": width, "ROWS_OF_PROGRAM": ROWS_OF_PROGRAM} | TILE


@triton.jit
def geglu_forward(
    x_pointer, bias_pointer, out_pointer, num_rows, WIDTH: tl.constexpr,
    ROWS_OF_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):
    """Some rows of one block of columns; grid (blocks of rows, blocks of columns)."""
    columns, first_bias, second_bias = _columns(bias_pointer, WIDTH, ROWS, COLUMNS)
    begin = tl.program_id(0) * ROWS_OF_PROGRAM
    end = tl.minimum(begin + ROWS_OF_PROGRAM, num_rows)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < end) & (columns < WIDTH)
        source = x_pointer + rows * 2 * WIDTH + columns
        first = tl.load(source, mask=mask).to(tl.float32) + first_bias
        second = tl.load(source + WIDTH, mask=mask).to(tl.float32) + second_bias
        distribution, _ = _normal(first)
        out = first * distribution * second
        tl.store(
            out_pointer + rows * WIDTH + columns, out.to(out_pointer.dtype.element_ty), mask=mask
        )


@triton.jit
def geglu_backward(
    grad_pointer, x_pointer, bias_pointer, dx_pointer, sums_pointer, num_rows, WIDTH: tl.constexpr,
    ROWS_OF_PROGRAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):
    """Gradient of x, and of the bias summed over the rows of each program; grid as forward."""
    columns, first_bias, second_bias = _columns(bias_pointer, WIDTH, ROWS, COLUMNS)
    begin = tl.program_id(0) * ROWS_OF_PROGRAM
    end = tl.minimum(begin + ROWS_OF_PROGRAM, num_rows)
    first_sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    second_sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(begin, end, ROWS, num_stages=STAGES):
        rows = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < end) & (columns < WIDTH)
        source = x_pointer + rows * 2 * WIDTH + columns
        first = tl.load(source, mask=mask, other=0.0).to(tl.float32) + first_bias
        second = tl.load(source + WIDTH, mask=mask, other=0.0).to(tl.float32) + second_bias
        grad = tl.load(grad_pointer + rows * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
        distribution, density = _normal(first)
        first_grad = grad * second * (distribution + first * density)
        second_grad = grad * first * distribution
        target = dx_pointer + rows * 2 * WIDTH + columns
        tl.store(target, first_grad.to(dx_pointer.dtype.element_ty), mask=mask)
        tl.store(target + WIDTH, second_grad.to(dx_pointer.dtype.element_ty), mask=mask)
        first_sums += first_grad
        second_sums += second_grad

    sums = sums_pointer + tl.program_id(0) * 2 * WIDTH + columns
    tl.store(sums, tl.sum(first_sums, 0, keep_dims=True), mask=columns < WIDTH)
    tl.store(sums + WIDTH, tl.sum(second_sums, 0, keep_dims=True), mask=columns < WIDTH)


@triton.jit
def _columns(bias_pointer, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of this program, [1, COLUMNS], and the biases of both halves, fp32 of a tile."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    # Loaded at its own size, a bias would have all arithmetic done in its layout: one column a
    # thread, elements read from shared memory one by one, and the distribution taken twice.
    source = bias_pointer + tl.broadcast_to(columns, (ROWS, COLUMNS))
    first = tl.load(source, mask=columns < WIDTH, other=0.0)
    second = tl.load(source + WIDTH, mask=columns < WIDTH, other=0.0)
    return columns, first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _normal(x):
    """Normal distribution and density at x.

    At -|x| the distribution is exp(-x * x / 2) times a polynomial in t = 1 / (1 + 0.35 |x|), the
    form of Abramowitz and Stegun 7.1.26, here fitted to 3e-8 and, down to -5, 1e-5 of the value. It
    takes half the instructions of `tl.erf`, which has another exponential than the density's.
    """
    scaled = 1.0 + 0.35 * tl.abs(x)
    # The reciprocal by one approximation; around that of a division there is a scaling.
    t = tl.rsqrt(scaled * scaled)
    tail = 0.0431454067 * t - 0.17807548
    tail = tail * t + 0.199903681
    tail = tail * t + 0.0191323826
    tail = tail * t + 0.138086466
    tail = tail * t + 0.138160837
    tail = tail * t + 0.139646734
    exponential = tl.exp2(EXPONENT * x * x)
    tail *= t * exponential
    return tl.where(x < 0, tail, 1.0 - tail), DENSITY_AT_0 * exponential
