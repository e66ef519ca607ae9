"""Prefix attention by cuDNN: the mask as two calls over ragged rows, none of it computed in vain.

Without dropout the forward pass is cut by queries: those of a context see the context, the others
see their sample, causal from its end; no output has to be merged. With dropout, which cuDNN does
not join to that mask, and in the backward pass it is cut by keys: the rectangle of all queries over
the context and the triangle of the other queries over their own keys, causal from the beginning.
The gradients of keys and values are then complete, and what the two say of a later query is added.

Gradients of queries are summed as they come, unless --deterministic-mode asks for one order.

Rows of a batch are as many as `samples` has places, used or not; an unused one costs an idle block
for each 128 tokens of the sequence. Training gives no more places than a power of two needs, and
cuDNN plans anew for each such number: at most seven times in a run, up to 64 samples.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_glm.model.attention import cudnn_graphs, merge_kernel
from megatron_glm.model.attention.bounds import PerBatch
from megatron_glm.model.attention.cudnn_graphs import Form, Part, offsets
from megatron_glm.model.attention.half_precision import require_half_precision


def attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """`Attention` in half precision.

    With the same seed it drops other probabilities than the other backends: cuDNN has its own
    generator.

    Raises:
        GLMError: a dtype other than bf16 or fp16, a head dimension that cuDNN does not take.
    """
    require_half_precision("cudnn", query)
    rate, seed = (0.0, None) if dropout is None else dropout
    return _PrefixAttention.apply(query, key, value, samples, softmax_scale, rate, seed)


class Cuts:
    """The parts into which a batch of packs is cut; made once a micro-batch, without a sync."""

    def __init__(self, samples: Tensor, seq_length: int):
        contexts, ends = samples[:, 0], samples[:, 1]
        starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        lengths = ends - starts
        contexts = contexts.minimum(lengths)
        later = lengths - contexts
        # A row without keys gets no queries either, and the other way round.
        with_context, with_later = (contexts > 0).int(), (later > 0).int()
        self._seq_length = seq_length
        self._ends, self._context_ends = ends, starts + contexts
        self._has_context = with_context
        self.context = _part(starts, contexts, starts, contexts, None)
        self.targets = _part(starts + contexts, later, starts, lengths * with_later, "BOTTOM_RIGHT")
        self.rectangle = _part(starts, lengths * with_context, starts, contexts, None)
        self.triangle = _part(starts + contexts, later, starts + contexts, later, "TOP_LEFT")
        self._offsets: dict = {}

    def offsets(self, part: Part, of: str, x: Tensor) -> Tensor:
        """`cudnn_graphs.offsets` of the rows of queries or keys of a part in x."""
        start = part.query_start if of == "query" else part.key_start
        key = (start.data_ptr(), x.stride()[:2])
        if key not in self._offsets:
            self._offsets[key] = offsets(start, x)
        return self._offsets[key]

    @cached_property
    def origin(self) -> Tensor:
        """int8 [s, b]: 0 for a token of a context, whose outputs lie in the rectangle alone; 1 for
        a later one with a context, whose outputs lie in both; 2 for one of the triangle alone."""
        batch = self._ends.shape[0]
        token = torch.arange(self._seq_length, dtype=torch.int32, device=self._ends.device)
        token = token.expand(batch, -1).contiguous()
        sample = torch.searchsorted(self._ends.contiguous(), token, right=True)
        is_later = token >= self._context_ends.gather(1, sample)
        origin = is_later * (2 - self._has_context.gather(1, sample))
        return origin.t().to(torch.int8).contiguous()


_cuts: Callable[[Tensor, int], Cuts] = PerBatch(Cuts)


def _part(query_start, query_length, key_start, key_length, alignment) -> Part:
    rows = (query_start, query_length, key_start, key_length)
    return Part(*(x.reshape(-1).contiguous() for x in rows), alignment)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, samples, softmax_scale, rate, seed):
        inputs = (query, key, value)
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
        cuts = _cuts(samples, query.shape[0])
        call = _Call(cuts, query, key, value, softmax_scale, rate, seed)
        out, lse = call.new_output()
        if seed is None:
            call.forward(cuts.context, out, lse)
            call.forward(cuts.targets, out, lse)
        else:
            call.forward(cuts.rectangle, out, lse)
            other, other_lse = call.new_output()
            call.forward(cuts.triangle, other, other_lse)
            merge(cuts.origin, out, other, lse, other_lse)
        ctx.save_for_backward(query, key, value, out, lse, samples, seed)
        ctx.softmax_scale, ctx.rate = softmax_scale, rate
        return out.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse, samples, seed = ctx.saved_tensors
        cuts = _cuts(samples, query.shape[0])
        call = _Call(cuts, query, key, value, ctx.softmax_scale, ctx.rate, seed)
        grad = grad.reshape(out.shape).contiguous()
        dq, dk, dv, other = (torch.empty_like(out) for _ in range(4))
        call.backward(cuts.rectangle, out, lse, grad, dq, dk, dv)
        call.backward(cuts.triangle, out, lse, grad, other, dk, dv)
        merge(cuts.origin, dq, other)
        return dq, dk, dv, None, None, None, None


class _Call:
    """What the parts of one attention have in common."""

    def __init__(self, cuts, query, key, value, softmax_scale, rate, seed):
        self.cuts = cuts
        self.inputs = {"query": query, "key": key, "value": value}
        self.softmax_scale, self.rate = softmax_scale, rate
        self.seeds = None
        if seed is not None:
            # Each part has its own 64 bits, from the same two words in either order.
            first, second = seed.long()
            self.seeds = {None: (first << 32) + second, "TOP_LEFT": (second << 32) + first}

    def new_output(self) -> tuple[Tensor, Tensor]:
        """Room for output [s, b, n, d] and log-sum-exp [s, b, n]."""
        query = self.inputs["query"]
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        return out, torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)

    def forward(self, part: Part, out: Tensor, lse: Tensor) -> None:
        """Write outputs and log-sum-exp of the queries of a part."""
        self._run(part, True, out, {"out": out, "lse": lse})

    def backward(self, part, out, lse, grad, dq, dk, dv) -> None:
        """Write what a part has of the gradients of its queries and keys."""
        gradients = {"grad": grad, "dq": dq, "dk": dk, "dv": dv}
        key_offsets = {"dk_offset": self.cuts.offsets(part, "key", dk)}
        self._run(part, False, out, {"out": out, "lse": lse} | gradients | key_offsets)

    def _run(self, part, is_forward, out, tensors):
        tensors = self.inputs | tensors | {
            "query_length": part.query_length,
            "key_length": part.key_length,
            "query_offset": self.cuts.offsets(part, "query", self.inputs["query"]),
            "key_offset": self.cuts.offsets(part, "key", self.inputs["key"]),
            "value_offset": self.cuts.offsets(part, "key", self.inputs["value"]),
            "out_offset": self.cuts.offsets(part, "query", out),
            "lse_offset": self.cuts.offsets(part, "query", tensors["lse"]),
        }
        if self.seeds is not None:
            seed = self.seeds[part.alignment]
            tensors |= {"seed": seed, "seed_offset": torch.zeros_like(seed)}
        query = self.inputs["query"]
        form = Form(
            is_forward, part.alignment, self.rate, self.softmax_scale, query.dtype,
            part.query_start.numel(), tuple(query.shape),
            tuple(x.stride() for x in self.inputs.values()), query.device.index or 0,
            torch.are_deterministic_algorithms_enabled(),
        )
        cudnn_graphs.run(form, tensors)


def merge(
    origin: Tensor, x: Tensor, other: Tensor,
    lse: Tensor | None = None, other_lse: Tensor | None = None,
) -> None:
    """Complete x, [s, b, n, d], in place by what `other` has of the rows of the triangle.

    With log-sum-exp [s, b, n] of both, x and other are outputs and become their mean by weight, and
    lse that of all keys; without, they are gradients and are added. origin: as `Cuts.origin`.
    """
    seq_length, batch, heads, dim = x.shape
    size = triton.next_power_of_2(dim)
    block = max(1, min(triton.next_power_of_2(heads), 4096 // size))
    has_lse = lse is not None
    merge_kernel.merge[(seq_length * batch, triton.cdiv(heads, block))](
        origin, x, other, lse if has_lse else x, other_lse if has_lse else x, heads,
        DIM=dim, SIZE=size, BLOCK=block, WEIGHTED=has_lse,
    )
