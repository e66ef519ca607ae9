"""FlashAttention-4's kernels under GLM's mask: they walk the blocks that hold anything and ask
`visible` about the tokens of those that are not visible altogether.

The two functions that are called are private there, but torch calls them too; unlike the public
one they write where they are told, into [s, b, n, d].
"""

from typing import NamedTuple

import torch
from cutlass import Int32, cute
from flash_attn.cute import utils
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor
from torch.nn.functional import pad

from megatron_glm.model.attention.blocks import block_lists, block_masks
from megatron_glm.model.attention.bounds import token_bounds

KEYS = 128
"""Keys of a block, as the kernels have them."""


class Mask(NamedTuple):
    """The mask as the kernels take it."""

    bounds: tuple[Tensor, Tensor]
    """First key that each query sees and one past the last, int32 [b, s], up to whole blocks."""
    forward: BlockSparseTensorsTorch
    """Of each block of queries the blocks of keys."""
    backward: BlockSparseTensorsTorch
    """Of each block of keys the blocks of queries."""


def make_mask(samples: Tensor, seq_length: int) -> Mask:
    """The mask of `samples` [b, 2, k], made where these lie without a sync."""
    bounds = token_bounds(samples, seq_length)
    queries = queries_of_a_block(torch.cuda.get_device_capability(samples.device))
    partial, full = block_masks(bounds, queries, KEYS)
    forward, backward = (
        BlockSparseTensorsTorch(
            *block_lists(some), *block_lists(every), block_size=(queries, KEYS)
        )
        for some, every in ((partial, full), (partial.mT, full.mT))
    )
    # On Hopper the rows of a last block that are past the end ask too, and nobody heeds the answer.
    beyond = (0, -seq_length % queries)
    return Mask((pad(bounds.key_start, beyond), pad(bounds.key_end, beyond)), forward, backward)


def queries_of_a_block(capability: tuple[int, int]) -> int:
    """Queries of a block: on Blackwell the kernels take two tiles of 128 at a time."""
    return 128 if capability[0] == 9 else 256


@cute.jit
def visible(sequence, head, query, key, lengths, bounds):
    """Whether a query sees a key, for the kernels; each argument holds one number of a thread."""
    start = utils.scalar_to_ssa(bounds[0][sequence[0], query[0]], Int32)
    end = utils.scalar_to_ssa(bounds[1][sequence[0], query[0]], Int32)
    return (key >= start) & (key < end)


def forward(query, key, value, out, mask: Mask, softmax_scale: float) -> Tensor:
    """Write `out`; all are [b, s, n, d]. Returns the log-sum-exp of the scores, fp32 [b, n, s]."""
    _, lse, *_ = _flash_attn_fwd(
        query, key, value, softmax_scale=softmax_scale, mask_mod=visible,
        aux_tensors=list(mask.bounds), block_sparse_tensors=mask.forward, out=out, return_lse=True,
    )  # fmt: skip
    return lse


def backward(inputs, out, lse, grad, gradients, mask: Mask, softmax_scale: float) -> None:
    """Write the gradients of the inputs: query, key and value; all but lse are [b, s, n, d]."""
    dq, dk, dv = gradients
    _flash_attn_bwd(
        *inputs, out, grad, lse, softmax_scale=softmax_scale, mask_mod=visible,
        aux_tensors=list(mask.bounds), block_sparse_tensors=mask.backward, dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
