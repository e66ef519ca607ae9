"""Cross entropy over a vocabulary split across tensor parallel ranks, without a copy of the logits.

One pass over the logits, in the dtype in which they are, gives each token's maximum and sum of
exponentials (online softmax, arXiv 1805.02867); ranks exchange these alone. The backward pass
writes the gradient where the logits lie. So nothing of the size of the logits is ever made.
"""

import torch
import torch.distributed
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096
"""Logits of a token that a program has at hand at once: two words of 16 bytes a thread."""
NUM_WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)


def vocab_parallel_cross_entropy(
    logits: Tensor, target: Tensor, group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Cross entropy of every token, fp32 [s, b], as Megatron's function of this name gives it.

    logits: [s, b, v / tp] on a GPU, fp32, bf16 or fp16, of the part of the vocabulary that belongs
    to this rank of `group`, without one the whole; arithmetic is in fp32. The backward pass
    overwrites them by their gradient: whoever saved them for a backward of his own gets autograd's
    error there. target: [s, b] int64, ids in the whole vocabulary.

    A second backward pass through a retained graph raises RuntimeError.
    """
    return _VocabParallelCrossEntropy.apply(logits, target, group)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, group):
        logits, target = logits.contiguous(), target.contiguous()
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        ctx.vocab_start = rank * logits.shape[-1]
        rows = target.numel()
        statistics = torch.empty(3, *target.shape, dtype=torch.float32, device=logits.device)
        row_statistics[(rows,)](
            logits, target, *statistics, ctx.vocab_start, logits.shape[-1],
            BLOCK=_block(logits), num_warps=NUM_WARPS,
        )
        largest, total, predicted = statistics
        if size > 1:
            own_largest = largest.clone()
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            total *= (own_largest - largest).exp_()
        local = target - ctx.vocab_start
        is_elsewhere = (local < 0) | (local >= logits.shape[-1])
        # Of two large logits only the difference matters, which fp32 has to more digits.
        predicted.sub_(largest).masked_fill_(is_elsewhere, 0.0)
        if size > 1:
            torch.distributed.all_reduce(statistics[1:], group=group)
        ctx.save_for_backward(logits, target, largest, total)
        ctx.is_spent = False
        return total.log() - predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.is_spent:
            raise RuntimeError(
                "vocab_parallel_cross_entropy: a second backward pass through one graph; the first "
                "has overwritten the logits by their gradient: run the forward pass again"
            )
        ctx.is_spent = True
        logits, target, largest, total = ctx.saved_tensors
        width, block = logits.shape[-1], _block(logits)
        overwrite_by_gradient[(target.numel(), triton.cdiv(width, block))](
            logits, target, largest, total, grad.contiguous(), ctx.vocab_start, width,
            BLOCK=block, num_warps=NUM_WARPS,
        )
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[-1]))


@triton.jit
def row_statistics(
    logits_pointer, target_pointer, largest_pointer, total_pointer, predicted_pointer,
    vocab_start, width, BLOCK: tl.constexpr,
):
    """Largest logit of a token, the sum of exponentials of the distances from it, and the logit of
    the target, or 0 where another rank has it; grid (s * b)."""
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * width
    # Neighbours that one thread has: threads wait for each other after the last block alone.
    NEIGHBOURS: tl.constexpr = min(8, BLOCK)
    largest = tl.full((BLOCK // NEIGHBOURS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK // NEIGHBOURS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_pointer + columns, mask=columns < width, other=float("-inf"))
        logits = logits.to(tl.float32).reshape(BLOCK // NEIGHBOURS, NEIGHBOURS)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        shift = _finite(new_largest)
        total *= _exp(largest - shift)
        total += tl.sum(_exp(logits - shift[:, None]), 1)
        largest = new_largest
    row_largest = tl.max(largest, 0)
    total *= _exp(largest - _finite(row_largest))
    tl.store(largest_pointer + row, row_largest)
    tl.store(total_pointer + row, tl.sum(total, 0))
    local = tl.load(target_pointer + row) - vocab_start
    is_here = (local >= 0) & (local < width)
    predicted = tl.load(logits_pointer + local, mask=is_here, other=0.0)
    tl.store(predicted_pointer + row, predicted.to(tl.float32))


@triton.jit
def overwrite_by_gradient(
    logits_pointer, target_pointer, largest_pointer, total_pointer, grad_pointer,
    vocab_start, width, BLOCK: tl.constexpr,
):
    """(softmax - one at the target) * grad in the place of the logits; grid (s * b, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_pointer += row * width + columns
    logits = tl.load(logits_pointer, mask=columns < width, other=float("-inf")).to(tl.float32)
    inverse_total = 1.0 / tl.load(total_pointer + row)
    softmax = _exp(logits - tl.load(largest_pointer + row)) * inverse_total
    local = (tl.load(target_pointer + row) - vocab_start).to(tl.int32)
    slope = softmax - tl.where(columns == local, 1.0, 0.0)
    gradient = slope * tl.load(grad_pointer + row)
    tl.store(
        logits_pointer, gradient.to(logits_pointer.dtype.element_ty), mask=columns < width
    )


@triton.jit
def _finite(largest):
    """What to take off: logits may be nothing but -inf so far."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _exp(x):
    # tl.exp scales numbers that are subnormal, which these sums do without.
    return tl.exp2(x * LOG2_E)
