"""Choosing the next token from logits: pure functions of one row's scores."""

from collections.abc import Sequence

import torch


def repeated_ngram_ends(tokens: Sequence[int], size: int) -> list[int]:
    """Tokens that would end an n-gram of `size` tokens that `tokens` holds already."""
    if size < 1 or len(tokens) + 1 < size:
        return []
    last = tuple(tokens[len(tokens) - size + 1 :])
    return [
        tokens[i + size - 1]
        for i in range(len(tokens) - size + 1)
        if tuple(tokens[i : i + size - 1]) == last
    ]


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Logits [v] with all but the k largest at -inf; those equal to the k-th stay. 0: all stay."""
    if k < 1 or k >= len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Logits [v] with all at -inf but the likeliest tokens whose probabilities first sum up to `p`,
    in (0, 1]; the likeliest token always stays."""
    if p >= 1.0:
        return logits
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    dropped = torch.empty_like(before, dtype=torch.bool).scatter_(0, index, before >= p)
    dropped[index[0]] = False
    return logits.masked_fill(dropped, -torch.inf)


def sample(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """A token drawn from logits fp32 [v]; the likeliest one at temperature 0."""
    if temperature == 0.0:
        return int(logits.argmax())
    kept = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return int(torch.multinomial(kept.softmax(-1), 1, generator=generator))
