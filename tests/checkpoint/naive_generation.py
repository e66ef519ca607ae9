"""GLM's generation written as slowly and plainly as it can be: the whole sequence at every step."""

import torch

from megatron_glm.checkpoint.reference import forward

# Scores of the next token, fp32 [v], given context, the fillings so far (the last one unfinished).
Sequence = tuple[list[int], list[list[int]]]


def next_scores(source, special_ids: dict[str, int], sequence: Sequence) -> torch.Tensor:
    """Log-probabilities of the token that follows; `eop` at the end of every blank."""
    context, fillings = sequence
    masks = [
        (place, token)
        for place, token in enumerate(context)
        if token in (special_ids["[MASK]"], special_ids["[sMASK]"], special_ids["[gMASK]"])
    ]
    tokens, positions = list(context), list(range(len(context)))
    for (place, token), filling in zip(masks, fillings, strict=False):
        tokens += [special_ids["<sop>"], *filling]
        goes_on = token == special_ids["[gMASK]"]
        start = len(context) if goes_on else place
        positions += [start + (i if goes_on else 0) for i in range(len(filling) + 1)]
    weights = source.weights
    logits = forward(
        weights.__getitem__,
        source.settings.dimensions,
        torch.tensor([tokens]),
        torch.tensor([positions]),
        torch.tensor([[[0, len(context), len(tokens)]]]),
        source.settings.rotary_angle_dtype,
    )[0, -1]
    # `sop` is never a prediction.
    logits[special_ids["<sop>"]] = -torch.inf
    return logits.log_softmax(-1)


def fill_greedily(source, special_ids: dict[str, int], context: list[int], steps: int) -> list[int]:
    """Tokens behind the first `sop`, as generate() returns them: a `sop` between two blanks."""
    blanks = sum(context.count(special_ids[name]) for name in ("[MASK]", "[sMASK]", "[gMASK]"))
    fillings: list[list[int]] = [[]]
    result: list[int] = []
    while len(result) < steps:
        token = int(next_scores(source, special_ids, (context, fillings)).argmax())
        if token == special_ids["<eop>"] and len(fillings) < blanks:
            fillings.append([])
            result.append(special_ids["<sop>"])
            continue
        result.append(token)
        if token in (special_ids["<eop>"], special_ids["<eod>"]):
            break
        fillings[-1].append(token)
    return result
