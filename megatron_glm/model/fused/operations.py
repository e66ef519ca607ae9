"""The fused kernels beside torch's operations that compute the same: what checks and times compare.

Tests have references of their own, so that a mistake in these shows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_glm.model.dropout import Dropout
from megatron_glm.model.fused import cross_entropy, geglu, residual_norm, rotary
from megatron_glm.model.residual import Sum
from megatron_glm.model.rotary import RotaryTable, rotate_query_key

ALPHA, EPS = 4.0, 1e-5


class Sizes(NamedTuple):
    """What one rank has of a micro-batch and of the model: s * b, h, f / tp, n / tp, d, v / tp."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    dim: int
    vocab: int


class Operation(NamedTuple):
    """Two ways to the same results."""

    kernel: Callable
    by_torch: Callable
    leaves: tuple[Tensor, ...]
    """Arguments of both. A kernel may overwrite them."""


class Inputs(NamedTuple):
    """What operations are made of."""

    sizes: Sizes
    draw: Callable[..., Tensor]
    """Makes a random tensor of these dimensions, of the dtype and on the device in question."""
    dropout: Dropout | None
    """What kernels drop."""
    drop: Callable[[Tensor], Tensor]
    """Drops elements of [..., h] by torch: the same ones, or as many."""


def _residual_norm(inputs: Inputs) -> Operation:
    def kernel(x, bias, residual, *norm):
        terms = Sum(x, bias, residual, ALPHA, inputs.dropout)
        return residual_norm.residual_norm(terms, *norm, EPS)

    def by_torch(x, bias, residual, *norm):
        return _norm_twice(ALPHA * residual + inputs.drop(x + bias), *norm)

    return Operation(kernel, by_torch, (*_terms(inputs), *_norm(inputs)))


def _residual_sum(inputs: Inputs) -> Operation:
    return Operation(
        lambda *terms: residual_norm.residual_sum(Sum(*terms, ALPHA, inputs.dropout)),
        lambda x, bias, residual: ALPHA * residual + inputs.drop(x + bias),
        _terms(inputs),
    )


def _layer_norm(inputs: Inputs) -> Operation:
    x, _, _ = _terms(inputs)
    return Operation(
        lambda *leaves: residual_norm.layer_norm(*leaves, EPS), _norm_twice, (x, *_norm(inputs))
    )


def _bias_geglu(inputs: Inputs) -> Operation:
    def by_torch(x, bias):
        first, second = (x + bias).chunk(2, dim=-1)
        return F.gelu(first) * second

    width = 2 * inputs.sizes.ffn
    leaves = inputs.draw(inputs.sizes.tokens, 1, width), inputs.draw(width)
    return Operation(geglu.bias_geglu, by_torch, leaves)


def _rotate_query_key(inputs: Inputs) -> Operation:
    tokens, heads, dim = inputs.sizes.tokens, inputs.sizes.heads, inputs.sizes.dim
    mixed, bias = inputs.draw(tokens, 1, heads, 3 * dim), inputs.draw(heads * 3 * dim)
    positions = torch.arange(tokens, device=mixed.device)[None]
    rotation = RotaryTable(tokens, dim, 10000.0, "fp32")(positions)
    return Operation(
        lambda mixed, bias: rotary.rotate_query_key_(mixed, bias, rotation),
        lambda mixed, bias: rotate_query_key(mixed, bias, rotation),
        (mixed, bias),
    )


def _cross_entropy(inputs: Inputs) -> Operation:
    tokens, vocab = inputs.sizes.tokens, inputs.sizes.vocab
    logits = inputs.draw(tokens, 1, vocab)
    target = torch.arange(tokens, device=logits.device)[:, None] % vocab

    def by_torch(logits):
        rows = logits.flatten(0, 1).float()
        return F.cross_entropy(rows, target.flatten(), reduction="none").view_as(target)

    return Operation(
        lambda logits: cross_entropy.vocab_parallel_cross_entropy(logits, target),
        by_torch,
        (logits,),
    )


OPERATIONS: dict[str, Callable[[Inputs], Operation]] = {
    "residual_norm": _residual_norm,
    "residual_sum": _residual_sum,
    "layer_norm": _layer_norm,
    "bias_geglu": _bias_geglu,
    "rotate_query_key_": _rotate_query_key,
    "vocab_parallel_cross_entropy": _cross_entropy,
}
"""By the name of the kernel's function."""


def _terms(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """x, bias and residual of a Sum."""
    tokens, hidden = inputs.sizes.tokens, inputs.sizes.hidden
    return inputs.draw(tokens, 1, hidden), inputs.draw(hidden), inputs.draw(tokens, 1, hidden)


def _norm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm."""
    return inputs.draw(inputs.sizes.hidden), inputs.draw(inputs.sizes.hidden)


def _norm_twice(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(x, weight.shape, weight, bias, EPS)
    return y, y
