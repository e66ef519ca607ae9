"""Triton kernels of z = alpha * residual + dropout(x + bias) and y = LayerNorm(z).

Tensors are [rows, columns] without gaps, statistics fp32 [rows]. Arithmetic is in fp32 whatever the
tensors hold. SUM, NORM and DROPOUT say which parts of the formula there are; without SUM, z is x.
"""

import triton
import triton.language as tl

from megatron_glm.model.dropout_kernels import is_kept, key_word, token_word


@triton.jit
def forward(
    x_pointer, residual_pointer, bias_pointer, weight_pointer, norm_bias_pointer,
    z_pointer, y_pointer, mean_pointer, rstd_pointer, eps,
    alpha, seed_pointer, threshold, keep_factor,
    COLUMNS: tl.constexpr, SUM: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):
    """One row, of so many blocks; grid (rows,)."""
    row = tl.program_id(0)
    blocks = ()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        columns, inside, elements = _part_of_row(row, block, COLUMNS, BLOCK)
        z = tl.load(x_pointer + elements, mask=inside, other=0.0).to(tl.float32)
        if SUM:
            z += tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
            if DROPOUT:
                row_word = token_word(seed_pointer, row)
                kept = is_kept(row_word, key_word(seed_pointer, columns), threshold)
                z = tl.where(kept, z * keep_factor, 0.0)
            residual = tl.load(residual_pointer + elements, mask=inside, other=0.0)
            z += alpha * residual.to(tl.float32)
            # The backward pass sees z as it is stored: so must the norm.
            rounded = z.to(z_pointer.dtype.element_ty)
            tl.store(z_pointer + elements, rounded, mask=inside)
            z = rounded.to(tl.float32)
        total += z
        blocks = blocks + (z,)
    if NORM:
        mean = tl.sum(total, 0) / COLUMNS
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for block in tl.static_range(BLOCKS):
            _, inside, _ = _part_of_row(row, block, COLUMNS, BLOCK)
            centred = tl.where(inside, blocks[block] - mean, 0.0)
            squares += centred * centred
        rstd = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
        for block in tl.static_range(BLOCKS):
            columns, inside, elements = _part_of_row(row, block, COLUMNS, BLOCK)
            weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_pointer + columns, mask=inside, other=0.0)
            y = (blocks[block] - mean) * rstd * weight + norm_bias.to(tl.float32)
            tl.store(y_pointer + elements, y.to(y_pointer.dtype.element_ty), mask=inside)
        tl.store(mean_pointer + row, mean)
        tl.store(rstd_pointer + row, rstd)


@triton.jit
def _part_of_row(row, block, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a block, whether there are such, and where the row's elements lie."""
    columns = block * BLOCK + tl.arange(0, BLOCK)
    return columns, columns < COLUMNS, row.to(tl.int64) * COLUMNS + columns


@triton.jit
def _gradient_of_y(grad_pointer, other_pointer, elements, inside):
    grad = tl.load(grad_pointer + elements, mask=inside, other=0.0).to(tl.float32)
    return grad + tl.load(other_pointer + elements, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def row_means(
    grad_pointer, other_pointer, z_pointer, mean_pointer, rstd_pointer, weight_pointer,
    slope_mean_pointer, product_mean_pointer, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):
    """Means over one row of the gradient of the normalised z, and of its product with the
    normalised z: what `backward` needs to know of the columns that it does not see; grid (rows,).
    """
    row = tl.program_id(0)
    mean, rstd = tl.load(mean_pointer + row), tl.load(rstd_pointer + row)
    slopes = tl.zeros((BLOCK,), dtype=tl.float32)
    products = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < COLUMNS
        elements = row.to(tl.int64) * COLUMNS + columns
        weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
        slope = _gradient_of_y(grad_pointer, other_pointer, elements, inside) * weight
        z = tl.load(z_pointer + elements, mask=inside, other=0.0).to(tl.float32)
        slopes += slope
        products += slope * (z - mean) * rstd
    tl.store(slope_mean_pointer + row, tl.sum(slopes, 0) / COLUMNS)
    tl.store(product_mean_pointer + row, tl.sum(products, 0) / COLUMNS)


@triton.jit
def backward(
    grad_pointer, other_pointer, z_pointer, mean_pointer, rstd_pointer, weight_pointer,
    slope_mean_pointer, product_mean_pointer, dx_pointer, dresidual_pointer, sums_pointer,
    num_rows, alpha, seed_pointer, threshold, keep_factor,
    COLUMNS: tl.constexpr, SUM: tl.constexpr, NORM: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """Gradients of one block of columns and, summed over every so many rows, those of the vectors:
    sums [row programs, 3, columns] of bias, weight and norm bias; grid (row programs, blocks).

    grad and other are two gradients of y, which are added, or one of z without NORM. A block that
    holds whole rows takes their means itself, others from `row_means`.
    """
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    weight = tl.zeros((BLOCK,), dtype=tl.float32)
    if NORM:
        weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    words = columns
    if DROPOUT:
        words = key_word(seed_pointer, columns)
    bias_sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    weight_sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    norm_bias_sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    for start in tl.range(first, num_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        here = rows < num_rows
        tile = here[:, None] & inside[None, :]
        elements = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        if NORM:
            grad = _gradient_of_y(grad_pointer, other_pointer, elements, tile)
            z = tl.load(z_pointer + elements, mask=tile, other=0.0).to(tl.float32)
            mean = tl.load(mean_pointer + rows, mask=here, other=0.0)
            rstd = tl.load(rstd_pointer + rows, mask=here, other=0.0)
            normed = tl.where(tile, (z - mean[:, None]) * rstd[:, None], 0.0)
            slope = grad * weight[None, :]
            if BLOCK >= COLUMNS:
                # Together, for warps to wait for each other half as often.
                sums = tl.sum(tl.join(slope, slope * normed), 1)
                slope_mean, product_mean = tl.split(sums / COLUMNS)
            else:
                slope_mean = tl.load(slope_mean_pointer + rows, mask=here, other=0.0)
                product_mean = tl.load(product_mean_pointer + rows, mask=here, other=0.0)
            dz = (slope - slope_mean[:, None] - normed * product_mean[:, None]) * rstd[:, None]
            weight_sums += grad * normed
            norm_bias_sums += grad
        else:
            dz = tl.load(grad_pointer + elements, mask=tile, other=0.0).to(tl.float32)
        dx = dz
        if SUM:
            dresidual = (alpha * dz).to(dresidual_pointer.dtype.element_ty)
            tl.store(dresidual_pointer + elements, dresidual, mask=tile)
            if DROPOUT:
                row_words = token_word(seed_pointer, rows)
                kept = is_kept(row_words[:, None], words[None, :], threshold)
                dx = tl.where(kept, dz * keep_factor, 0.0)
            bias_sums += tl.where(tile, dx, 0.0)
        tl.store(dx_pointer + elements, dx.to(dx_pointer.dtype.element_ty), mask=tile)

    sums_pointer += tl.program_id(0).to(tl.int64) * 3 * COLUMNS + columns
    if SUM:
        tl.store(sums_pointer, tl.sum(bias_sums, 0), mask=inside)
    if NORM:
        tl.store(sums_pointer + COLUMNS, tl.sum(weight_sums, 0), mask=inside)
        tl.store(sums_pointer + 2 * COLUMNS, tl.sum(norm_bias_sums, 0), mask=inside)
