"""The residual norm, y = LayerNorm(alpha * residual + dropout(x + bias)), as one pass each way.

Memory passes of a layer in units of one [s, b, h] tensor, with dropout. "Apart" is Megatron's
compiled bias-dropout-add (which stores a mask of bytes), torch's LayerNorm and a scaled copy for
the residual; "fused" is what this file does; "deferred" would also join the layer's last sum with
the next layer's first norm.

|                                  | apart | fused | deferred |
|----------------------------------|-------|-------|----------|
| forward, sum before the MLP      | 3.5   | 4     | 4        |
| forward, norm before the MLP     | 2 + 2 |       |          |
| forward, last sum of the layer   | 3.5   | 3     | 4        |
| forward, first norm of the layer | 2 + 2 | 2     |          |
| backward, twice the scaled copy  | 2 * 5 |       |          |
| backward, twice the norm         | 2 * 5 | 5 + 4 | 5 + 5    |
| backward, twice the sum          | 2*3.5 | 3     |          |
| layer                            | 42    | 21    | 18       |

Rows wider than WHOLE_ROW read their gradients once more, 3 in each norm's backward pass.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_glm.model.dropout import Dropout
from megatron_glm.model.fused import residual_norm_kernels as kernels
from megatron_glm.model.fused.selection import num_processors
from megatron_glm.model.residual import Sum

# Chosen by compiling, untimed: `python -m benchmarks.fused` on the machine has the last word.
WHOLE_ROW = 4096
"""Columns up to which a program of the backward pass holds rows, and three sums of them."""
PART_OF_ROWS = (8, 128)
"""Rows and columns of the blocks of wider ones."""
ELEMENTS_PER_PROCESSOR = 4096
"""Elements of blocks on which one multiprocessor of a GPU works at a time."""
STAGES = 2
"""Blocks whose loads are in flight while another is worked on, and that one."""


def residual_norm(
    terms: Sum, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """LayerNorm of a sum over its last dimension.

    weight, norm_bias: [h]. Returns y twice, [..., h] of the dtype of x, as tensors that share
    memory: the input of what comes next and its residual. Their gradients stay apart, so that
    nothing has to be added before the backward pass reads both.
    """
    return _ResidualNorm.apply(
        terms.x, terms.bias, terms.residual, weight, norm_bias, terms.alpha, terms.dropout, eps
    )


def layer_norm(x: Tensor, weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm of x, [..., h]; returns y twice as `residual_norm` does."""
    return _ResidualNorm.apply(x, None, None, weight, norm_bias, 1.0, None, eps)


def normalised(y: Tensor) -> Tensor:
    """The tensor of which either made y by the norm, [..., h] as it is kept for the backward."""
    return y.grad_fn.saved_tensors[1]


def residual_sum(terms: Sum) -> Tensor:
    """The sum itself, [..., h] of the dtype of x."""
    return _ResidualNorm.apply(
        terms.x, terms.bias, terms.residual, None, None, terms.alpha, terms.dropout, 0.0
    )


class _ResidualNorm(torch.autograd.Function):
    """All three: without bias and residual the norm alone, without weight the sum alone."""

    @staticmethod
    def forward(ctx, x, bias, residual, weight, norm_bias, alpha, dropout, eps):
        ctx.has_sum, ctx.has_norm, ctx.alpha = residual is not None, weight is not None, alpha
        ctx.rate, seed = dropout or (0.0, None)
        x = x.contiguous()
        rows, columns = _rows_and_columns(x)
        z = torch.empty_like(x) if ctx.has_sum else x
        y = torch.empty_like(x) if ctx.has_norm else z
        mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        # Where there is nothing, x stands: a pointer that the kernel does not read.
        vectors = [x if vector is None else vector for vector in (bias, weight, norm_bias)]
        residual = residual.contiguous() if ctx.has_sum else x
        constants, num_warps = row_of(columns)
        kernels.forward[(rows,)](
            x, residual, *vectors, z, y, mean, rstd, eps, alpha,
            *_dropout_arguments(ctx.rate, seed, x), SUM=ctx.has_sum, NORM=ctx.has_norm,
            DROPOUT=seed is not None, **constants, num_warps=num_warps,
        )
        ctx.save_for_backward(seed, *((z, mean, rstd, weight) if ctx.has_norm else ()))
        return (y, y.data) if ctx.has_norm else z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, other=None):
        seed, *saved = ctx.saved_tensors
        grad = grad.contiguous()
        other = other.contiguous() if ctx.has_norm else grad
        rows, columns = _rows_and_columns(grad)
        tiles = tiles_of(rows, columns, num_processors(grad.device))
        dx = torch.empty_like(grad)
        dresidual = torch.empty_like(grad) if ctx.has_sum else dx
        z, mean, rstd, weight = saved or [grad] * 4
        slope_mean = product_mean = grad
        if ctx.has_norm and tiles.BLOCK < columns:
            slope_mean, product_mean = torch.empty_like(mean), torch.empty_like(mean)
            kernels.row_means[(rows,)](
                grad, other, z, mean, rstd, weight, slope_mean, product_mean,
                COLUMNS=columns, BLOCK=2048,
            )
        sums = torch.empty(tiles.programs, 3, columns, dtype=torch.float32, device=grad.device)
        kernels.backward[(tiles.programs, triton.cdiv(columns, tiles.BLOCK))](
            grad, other, z, mean, rstd, weight, slope_mean, product_mean, dx, dresidual, sums,
            rows, ctx.alpha, *_dropout_arguments(ctx.rate, seed, grad), COLUMNS=columns,
            SUM=ctx.has_sum, NORM=ctx.has_norm, DROPOUT=seed is not None, STAGES=STAGES,
            ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, num_warps=tiles.num_warps,
        )
        dbias, dweight, dnorm_bias = sums.sum(0).to(grad.dtype)
        of_sum = (dbias, dresidual) if ctx.has_sum else (None, None)
        of_norm = (dweight, dnorm_bias) if ctx.has_norm else (None, None)
        return dx, *of_sum, *of_norm, None, None, None


def row_of(columns: int) -> tuple[dict[str, int], int]:
    """Constants of the forward kernel, and its warps: a row for each program.

    By blocks of 4096 one of 12288 has no columns too many, and a multiprocessor room for two.
    """
    block = min(triton.next_power_of_2(columns), 4096)
    blocks = triton.cdiv(columns, block)
    return {"COLUMNS": columns, "BLOCK": block, "BLOCKS": blocks}, min(
        max(block * blocks // 512, 1), 16
    )


class Tiles(NamedTuple):
    """How the backward pass is cut."""

    ROWS: int
    BLOCK: int
    """Columns of a block."""
    programs: int
    """Programs that share the rows of a block of columns."""
    num_warps: int


def tiles_of(rows: int, columns: int, processors: int) -> Tiles:
    """Blocks of whole rows where they fit, and as many programs as can work at a time.

    processors: multiprocessors of the GPU.
    """
    block = triton.next_power_of_2(columns)
    height, block = (1, block) if block <= WHOLE_ROW else PART_OF_ROWS
    at_a_time = processors * min(max(ELEMENTS_PER_PROCESSOR // (height * block), 1), 8)
    programs = min(triton.cdiv(at_a_time, triton.cdiv(columns, block)), triton.cdiv(rows, height))
    return Tiles(height, block, programs, min(max(height * block // 256, 1), 16))


def _rows_and_columns(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _dropout_arguments(rate: float, seed: Tensor | None, x: Tensor) -> tuple[Tensor, int, float]:
    """Seed, threshold and factor of what is kept; x stands for a seed that is not read."""
    if seed is None:
        return x, 0, 1.0
    dropout = Dropout(rate, seed)
    return seed, dropout.threshold, 1.0 / dropout.keep_probability
