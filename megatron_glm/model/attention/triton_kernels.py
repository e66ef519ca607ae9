"""Triton kernels of prefix attention: forward, gradient of queries, gradient of keys and values.

A program owns a block of rows and walks the blocks of columns that one of them sees. Both ends
of a row's interval grow along the sequence (see `bounds`), so the first and last row of a block
give the blocks to visit and, among these, the ones that every row sees whole, which need no
mask. That holds for queries over keys and for keys over queries alike. Masked and whole blocks
share one loop with a branch: accumulators that pass from loop to loop make ptxas serialise the
tensor cores of Hopper.

Tensors are [s, b, n, d] with any strides but 1 on d; per-row words are [b, s] or [b * n, s].
Softmax is in fp32, in powers of two.
"""

import triton
import triton.language as tl

from megatron_glm.model.dropout_kernels import is_kept, key_word, query_word


@triton.jit
def _load_rows(pointer, rows, stride, dims, num_rows, HEAD_DIM: tl.constexpr):
    """[rows, dims] of one head, 0 beyond the sequence and beyond the head dimension."""
    return tl.load(
        pointer + rows.to(tl.int64)[:, None] * stride + dims[None, :],
        mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _store_rows(pointer, tile, rows, stride, dims, num_rows, HEAD_DIM: tl.constexpr):
    tl.store(
        pointer + rows.to(tl.int64)[:, None] * stride + dims[None, :],
        tile.to(pointer.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & (dims < HEAD_DIM)[None, :],
    )


@triton.jit
def _visits(start_pointer, end_pointer, first, last, BLOCK: tl.constexpr):
    """(begin, whole begin, whole end, end): columns to visit, and those seen by every row."""
    begin = tl.load(start_pointer + first) // BLOCK * BLOCK
    end = tl.load(end_pointer + last)
    whole_begin = tl.cdiv(tl.load(start_pointer + last), BLOCK) * BLOCK
    whole_begin = tl.minimum(whole_begin, tl.cdiv(end, BLOCK) * BLOCK)
    whole_end = tl.load(end_pointer + first) // BLOCK * BLOCK
    return begin, whole_begin, tl.maximum(whole_end, whole_begin), end


@triton.jit
def forward(
    q_pointer, k_pointer, v_pointer, out_pointer, lse_pointer,
    key_start_pointer, key_end_pointer, seed_pointer,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, o_s, o_b, o_n,
    num_rows, num_heads, scale, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp (base 2) of one block of queries; grid (blocks, b * n)."""
    # The last blocks of a sample see most: start them first, and the tail of the grid is short.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    pair = tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, DIMS)
    last = tl.minimum(first + BLOCK_M, num_rows) - 1
    key_start_pointer += batch * num_rows
    key_end_pointer += batch * num_rows
    key_start = tl.load(key_start_pointer + tl.minimum(rows, last))
    key_end = tl.load(key_end_pointer + tl.minimum(rows, last))
    query_words = rows
    if DROPOUT:
        query_words = query_word(seed_pointer, pair, rows)

    q_pointer += batch * q_b + head * q_n
    k_pointer += batch * k_b + head * k_n
    v_pointer += batch * v_b + head * v_n
    query = _load_rows(q_pointer, rows, q_s, dims, num_rows, HEAD_DIM)
    acc = tl.zeros((BLOCK_M, DIMS), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin, whole_begin, whole_end, end = _visits(
        key_start_pointer, key_end_pointer, first, last, BLOCK_N
    )
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key = _load_rows(k_pointer, keys, k_s, dims, num_rows, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        if (start < whole_begin) | (start >= whole_end):
            visible = (keys[None, :] >= key_start[:, None]) & (keys[None, :] < key_end[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        # A row may see nothing of this block, nor of those before it.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probability = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(probability, 1)
        if DROPOUT:
            kept = is_kept(
                query_words[:, None], key_word(seed_pointer, keys)[None, :], threshold
            )
            probability *= tl.where(kept, keep_factor, 0.0)
        value = _load_rows(v_pointer, keys, v_s, dims, num_rows, HEAD_DIM)
        acc = tl.dot(
            probability.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION
        )
        row_max = new_max

    out_pointer += batch * o_b + head * o_n
    out = acc * (1.0 / row_sum)[:, None]
    _store_rows(out_pointer, out, rows, o_s, dims, num_rows, HEAD_DIM)
    lse_pointer += pair.to(tl.int64) * num_rows
    tl.store(lse_pointer + rows, row_max + tl.log2(row_sum), mask=rows < num_rows)


@triton.jit
def output_dot_gradient(
    out_pointer, grad_pointer, delta_pointer, o_s, o_b, o_n, g_s, g_b, g_n, num_rows, num_heads,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr,
):
    """delta[b * n, s] = sum over d of output * its gradient; grid (blocks, b * n)."""
    pair = tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    rows, dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DIMS)
    out_pointer += batch * o_b + head * o_n
    grad_pointer += batch * g_b + head * g_n
    out = _load_rows(out_pointer, rows, o_s, dims, num_rows, HEAD_DIM).to(tl.float32)
    grad = _load_rows(grad_pointer, rows, g_s, dims, num_rows, HEAD_DIM).to(tl.float32)
    delta_pointer += pair.to(tl.int64) * num_rows
    tl.store(delta_pointer + rows, tl.sum(out * grad, 1), mask=rows < num_rows)


@triton.jit
def backward_queries(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer, dq_pointer,
    key_start_pointer, key_end_pointer, seed_pointer,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, g_s, g_b, g_n, dq_s, dq_b, dq_n,
    num_rows, num_heads, scale, softmax_scale, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Gradient of one block of queries; grid (blocks, b * n)."""
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    pair = tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    rows, dims = first + tl.arange(0, BLOCK_M), tl.arange(0, DIMS)
    last = tl.minimum(first + BLOCK_M, num_rows) - 1
    key_start_pointer += batch * num_rows
    key_end_pointer += batch * num_rows
    key_start = tl.load(key_start_pointer + tl.minimum(rows, last))
    key_end = tl.load(key_end_pointer + tl.minimum(rows, last))
    # Rows beyond the sequence have zero gradients: a finite lse is all that they need.
    words = pair.to(tl.int64) * num_rows + rows
    lse = tl.load(lse_pointer + words, mask=rows < num_rows, other=0.0)
    delta = tl.load(delta_pointer + words, mask=rows < num_rows, other=0.0)
    query_words = rows
    if DROPOUT:
        query_words = query_word(seed_pointer, pair, rows)

    q_pointer += batch * q_b + head * q_n
    k_pointer += batch * k_b + head * k_n
    v_pointer += batch * v_b + head * v_n
    grad_pointer += batch * g_b + head * g_n
    query = _load_rows(q_pointer, rows, q_s, dims, num_rows, HEAD_DIM)
    grad = _load_rows(grad_pointer, rows, g_s, dims, num_rows, HEAD_DIM)
    dq = tl.zeros((BLOCK_M, DIMS), dtype=tl.float32)
    begin, whole_begin, whole_end, end = _visits(
        key_start_pointer, key_end_pointer, first, last, BLOCK_N
    )
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        key = _load_rows(k_pointer, keys, k_s, dims, num_rows, HEAD_DIM)
        value = _load_rows(v_pointer, keys, v_s, dims, num_rows, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        probability = tl.exp2(scores - lse[:, None])
        if (start < whole_begin) | (start >= whole_end):
            visible = (keys[None, :] >= key_start[:, None]) & (keys[None, :] < key_end[:, None])
            probability = tl.where(visible, probability, 0.0)
        slope = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if DROPOUT:
            kept = is_kept(
                query_words[:, None], key_word(seed_pointer, keys)[None, :], threshold
            )
            slope *= tl.where(kept, keep_factor, 0.0)
        slope = probability * (slope - delta[:, None])
        dq = tl.dot(slope.to(key.dtype), key, dq, input_precision=PRECISION)

    dq_pointer += batch * dq_b + head * dq_n
    _store_rows(dq_pointer, dq * softmax_scale, rows, dq_s, dims, num_rows, HEAD_DIM)


@triton.jit
def backward_keys(
    q_pointer, k_pointer, v_pointer, grad_pointer, lse_pointer, delta_pointer,
    dk_pointer, dv_pointer, query_start_pointer, query_end_pointer, seed_pointer,
    q_s, q_b, q_n, k_s, k_b, k_n, v_s, v_b, v_n, g_s, g_b, g_n, dk_s, dk_b, dk_n, dv_s, dv_b, dv_n,
    num_rows, num_heads, scale, softmax_scale, threshold, keep_factor,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Gradients of one block of keys and of its values; grid (blocks, b * n).

    Tiles of probabilities are [keys, queries] here, so that the products need no transposition.
    """
    first = tl.program_id(0) * BLOCK_N
    pair = tl.program_id(1)
    batch, head = (pair // num_heads).to(tl.int64), (pair % num_heads).to(tl.int64)
    keys, dims = first + tl.arange(0, BLOCK_N), tl.arange(0, DIMS)
    last = tl.minimum(first + BLOCK_N, num_rows) - 1
    query_start_pointer += batch * num_rows
    query_end_pointer += batch * num_rows
    query_start = tl.load(query_start_pointer + tl.minimum(keys, last))
    query_end = tl.load(query_end_pointer + tl.minimum(keys, last))
    key_words = keys
    if DROPOUT:
        key_words = key_word(seed_pointer, keys)

    q_pointer += batch * q_b + head * q_n
    k_pointer += batch * k_b + head * k_n
    v_pointer += batch * v_b + head * v_n
    grad_pointer += batch * g_b + head * g_n
    lse_pointer += pair.to(tl.int64) * num_rows
    delta_pointer += pair.to(tl.int64) * num_rows
    key = _load_rows(k_pointer, keys, k_s, dims, num_rows, HEAD_DIM)
    value = _load_rows(v_pointer, keys, v_s, dims, num_rows, HEAD_DIM)
    dk = tl.zeros((BLOCK_N, DIMS), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, DIMS), dtype=tl.float32)
    begin, whole_begin, whole_end, end = _visits(
        query_start_pointer, query_end_pointer, first, last, BLOCK_M
    )
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        query = _load_rows(q_pointer, rows, q_s, dims, num_rows, HEAD_DIM)
        grad = _load_rows(grad_pointer, rows, g_s, dims, num_rows, HEAD_DIM)
        lse = tl.load(lse_pointer + rows, mask=rows < num_rows, other=0.0)
        delta = tl.load(delta_pointer + rows, mask=rows < num_rows, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        probability = tl.exp2(scores - lse[None, :])
        if (start < whole_begin) | (start >= whole_end):
            visible = (rows[None, :] >= query_start[:, None]) & (
                rows[None, :] < query_end[:, None]
            )
            probability = tl.where(visible, probability, 0.0)
        slope = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        dropped = probability
        if DROPOUT:
            kept = is_kept(
                query_word(seed_pointer, pair, rows)[None, :], key_words[:, None], threshold
            )
            dropped *= tl.where(kept, keep_factor, 0.0)
        dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision=PRECISION)
        slope = dropped * slope - probability * delta[None, :]
        dk = tl.dot(slope.to(query.dtype), query, dk, input_precision=PRECISION)

    dk_pointer += batch * dk_b + head * dk_n
    dv_pointer += batch * dv_b + head * dv_n
    _store_rows(dk_pointer, dk * softmax_scale, keys, dk_s, dims, num_rows, HEAD_DIM)
    _store_rows(dv_pointer, dv, keys, dv_s, dims, num_rows, HEAD_DIM)
