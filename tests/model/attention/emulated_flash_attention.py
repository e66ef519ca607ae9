"""FlashAttention-4's two functions in torch: they visit the listed blocks alone, ask the mask in
those that are partial, and take what they need as the kernels do."""

import sys
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class BlockSparseTensorsTorch(NamedTuple):
    """As in flash_attn.cute.block_sparsity."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int] | None = None


def visited(blocks, rows_are_queries, seq_length, mask_mod, bounds) -> Tensor:
    """bool [b, s, s]: what the kernels would compute by the lists of `blocks`."""
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in (*blocks[:4], *bounds))
    queries, keys = blocks.block_size
    batch = blocks.mask_block_cnt.shape[0]
    seen = torch.zeros(batch, seq_length, seq_length, dtype=torch.bool)
    token = torch.arange(seq_length)
    lists = ((blocks[0], blocks[1], False), (blocks[2], blocks[3], True))
    for count, index, is_full in lists:
        for b in range(batch):
            for row in range(count.shape[2]):
                for column in index[b, 0, row, : count[b, 0, row]].tolist():
                    m, n = (row, column) if rows_are_queries else (column, row)
                    # At the end of the sequence the mask is asked about rows past it as well.
                    q = torch.arange(m * queries, (m + 1) * queries)[:, None]
                    k = token[None, n * keys : (n + 1) * keys]
                    area = (b, slice(q[0, 0], q[-1, 0] + 1), slice(k[0, 0], k[0, -1] + 1))
                    assert not seen[area].any(), "a block is listed twice"
                    asked = is_full or mask_mod((b,), (0,), (q,), k, None, bounds)
                    seen[area] = is_full or asked[: seen[area].shape[0]]
    return seen


def flash_attn_fwd(
    query, key, value, *, softmax_scale, mask_mod, aux_tensors, block_sparse_tensors, out,
    return_lse,
):  # fmt: skip
    """[b, s, n, d] -> (out, fp32 log-sum-exp [b, n, s], three that are not used)."""
    seen = visited(block_sparse_tensors, True, query.shape[1], mask_mod, aux_tensors)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.mT * softmax_scale).masked_fill(~seen[:, None], float("-inf"))
    out.copy_((scores.softmax(-1) @ v).transpose(1, 2))
    assert return_lse
    return out, scores.logsumexp(-1), None, None, None


def flash_attn_bwd(
    query, key, value, out, grad, lse, *, softmax_scale, mask_mod, aux_tensors,
    block_sparse_tensors, dq, dk, dv,
):  # fmt: skip
    """Writes dq, dk and dv from what the forward pass kept."""
    seen = visited(block_sparse_tensors, False, query.shape[1], mask_mod, aux_tensors)
    q, k, v, o, g = (x.transpose(1, 2) for x in (query, key, value, out, grad))
    scores = (q @ k.mT * softmax_scale).masked_fill(~seen[:, None], float("-inf"))
    weights = (scores - lse[..., None]).exp()
    d_scores = weights * (g @ v.mT - (o * g).sum(-1, keepdim=True)) * softmax_scale
    for result, value_ in ((dq, d_scores @ k), (dk, d_scores.mT @ q), (dv, weights.mT @ g)):
        result.copy_(value_.transpose(1, 2))


def install(monkeypatch) -> None:
    """Put these, and as much of CuTe as the mask needs, in the packages' places."""
    contents = {
        "cutlass": {"Int32": None},
        "cutlass.cute": {"jit": lambda function: function},
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.utils": {"scalar_to_ssa": lambda number, dtype: number},
        "flash_attn.cute.block_sparsity": {"BlockSparseTensorsTorch": BlockSparseTensorsTorch},
        "flash_attn.cute.interface": {
            "_flash_attn_fwd": flash_attn_fwd, "_flash_attn_bwd": flash_attn_bwd,
        },
    }  # fmt: skip
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
