"""Corruption of text into blanks and their fillings: pure functions of arrays.

A sample is a context, in which every token sees every other, followed by what is generated, in
which a token sees the context and what precedes it (GLM-130B paper, section 2.1).
"""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np


class Objective(IntEnum):
    """How a sample was made; the value travels in a batch as `objectives`."""

    MASK = 0
    GMASK = 1
    SMASK = 2
    MULTITASK = 3


NO_OBJECTIVE = -1

OBJECTIVE_NAMES = {
    Objective.MASK: "[MASK]",
    Objective.GMASK: "[gMASK]",
    Objective.SMASK: "[sMASK]",
    Objective.MULTITASK: "multitask",
}


class SpecialTokens(NamedTuple):
    """Ids of the tokens that corruption inserts or looks for."""

    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    eod: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        return cls(*(getattr(tokenizer, name) for name in cls._fields))


class Sample(NamedTuple):
    """One corrupted sample of length l; arrays of shape [l].

    In the context, labels repeat the tokens and carry no loss.
    """

    tokens: np.ndarray  # int64
    labels: np.ndarray  # int64, the token that follows
    loss_mask: np.ndarray  # float32, 1 where the label is a target
    position_ids: np.ndarray  # int64
    context_length: int
    objective: Objective


def blank_sample(
    ids: np.ndarray, spans: np.ndarray, objective: Objective, special: SpecialTokens
) -> Sample:
    """Replaces each span by one blank and appends the spans in the given order.

    ids: [n] int64. spans: [k, 2] int64, start and end of disjoint non-empty ranges of ids, in the
    order in which they are generated. objective: MASK or SMASK, the kind of blank.

    Each span is generated as `sop` and its tokens, with its tokens and `eop` as targets, all at
    the position of its blank. The sample has n + 2k tokens (GLM paper, section 2.1).
    """
    num_ids = len(ids)
    starts, ends = spans[:, 0], spans[:, 1]

    # A span keeps its first place, for the blank, and hides the others.
    hidden = np.zeros(num_ids + 1, dtype=np.int64)
    hidden[starts + 1] += 1
    hidden[ends] -= 1
    kept = np.cumsum(hidden[:-1]) == 0
    context = ids.copy()
    context[starts] = special.mask if objective == Objective.MASK else special.smask
    context = context[kept]
    blank_positions = (np.cumsum(kept) - 1)[starts]

    lengths = ends - starts + 1
    closing = np.cumsum(lengths)
    opening = closing - lengths
    size = int(lengths.sum())
    source = np.arange(size) + np.repeat(starts - opening, lengths)
    labels = ids[np.minimum(source, num_ids - 1)]
    labels[closing - 1] = special.eop
    tokens = np.empty_like(labels)
    tokens[1:] = labels[:-1]
    tokens[opening] = special.sop

    return _join(context, tokens, labels, np.repeat(blank_positions, lengths), objective)


def gmask_sample(ids: np.ndarray, generation_length: int, special: SpecialTokens) -> Sample:
    """Hides the last `generation_length` tokens behind [gMASK]; the sample has n + 1 tokens.

    ids: [n] int64. generation_length: from 1 to n. Positions run on, and there is no `eop`, for
    the text goes on.
    """
    split = len(ids) - generation_length
    context = np.append(ids[:split], special.gmask)
    tokens = np.concatenate(([special.sop], ids[split:-1]))
    positions = np.arange(len(context), len(context) + generation_length)
    return _join(context, tokens, ids[split:], positions, Objective.GMASK)


def prompt_sample(
    prompt: np.ndarray,
    target: np.ndarray,
    max_length: int,
    special: SpecialTokens,
    unified_positions: bool = False,
    least_prompt: int = 0,
) -> Sample:
    """Prompt, [MASK], then the target, which ends in `eop` (GLM-130B paper, section 2.2).

    prompt: [n] int64, cut at its end where the sample would be longer than `max_length`. target:
    [m] int64. unified_positions: `sop` takes the position of [MASK] and positions run on from
    there, instead of running on through the whole sample. least_prompt: tokens of the prompt that
    are kept at the cost of the target; GLM-130B's trainer kept max_length // 4, but then targets
    are cut.

    Raises ValueError where the target does not fit.
    """
    if least_prompt:
        target = target[: max_length - 2 - min(least_prompt, len(prompt))]
    room = max_length - 2 - len(target)
    if room < 0:
        raise ValueError(
            f"a target of {len(target)} tokens does not fit in {max_length}: it needs 2 more"
        )
    context = np.append(prompt[:room], special.mask)
    first = len(context) - 1 if unified_positions else len(context)
    return _join(
        context,
        np.concatenate(([special.sop], target)),
        np.append(target, special.eop),
        np.arange(first, first + len(target) + 1),
        Objective.MULTITASK,
    )


def _join(
    context: np.ndarray,
    tokens: np.ndarray,
    labels: np.ndarray,
    positions: np.ndarray,
    objective: Objective,
) -> Sample:
    size = len(context)
    loss_mask = np.ones(size + len(tokens), dtype=np.float32)
    loss_mask[:size] = 0
    return Sample(
        tokens=np.concatenate((context, tokens)),
        labels=np.concatenate((context, labels)),
        loss_mask=loss_mask,
        position_ids=np.concatenate((np.arange(size), positions)),
        context_length=size,
        objective=objective,
    )
