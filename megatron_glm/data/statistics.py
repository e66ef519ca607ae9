"""What many sequences are like: padding, targets, spans, shares, tokens a source."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES, Objective, Sample
from megatron_glm.data.builder import MixedDataset
from megatron_glm.data.glm_dataset import GLMDataset
from megatron_glm.data.sample_view import sample_rows


def measure(dataset: MixedDataset, indices: Iterable[int]) -> dict[str, Any]:
    """Statistics of some sequences of a split; plain numbers, fit for JSON.

    Shares are between 0 and 1. `targets_expected` counts from the text what was hidden, with one
    `eop` for every blank that is closed; `targets_kept` counts the loss mask. `masked_share` and
    `generation_share` are means over samples of hidden tokens by tokens of text.
    """
    sequences: Counter = Counter()
    samples: Counter = Counter()
    tokens: Counter = Counter()
    spans: Counter = Counter()
    masked: list[float] = []
    generated: list[float] = []
    totals = Counter(dict.fromkeys(("tokens", "padding", "targets_expected", "targets_kept"), 0))
    for index in indices:
        identity, place = dataset.mix.locate(int(index))
        source = dataset.sources[identity]
        packed = source[place]
        totals["tokens"] += len(packed["tokens"])
        totals["padding"] += len(packed["tokens"])
        totals["targets_kept"] += int(packed["loss_mask"].sum())
        for (begin, end, _, objective), source_sample in zip(
            sample_rows(packed), _sources_of(source, place), strict=True
        ):
            size, hidden, num_closed, sample = source_sample
            samples[OBJECTIVE_NAMES[objective]] += 1
            tokens[source.dataset_path] += end - begin
            totals["padding"] -= end - begin
            totals["targets_expected"] += hidden + num_closed
            if objective in (Objective.MASK, Objective.SMASK):
                spans.update(_span_lengths(sample, source.corrupt.special.eop))
                masked.append(hidden / size)
            elif objective == Objective.GMASK:
                generated.append(hidden / size)
        sequences[OBJECTIVE_NAMES[objective]] += 1
    num_spans = max(sum(spans.values()), 1)
    return {
        "sequences": dict(sequences),
        "samples": dict(samples),
        "tokens": totals["tokens"],
        "padding_share": totals["padding"] / max(totals["tokens"], 1),
        "targets_expected": totals["targets_expected"],
        "targets_kept": totals["targets_kept"],
        "targets_lost": totals["targets_expected"] - totals["targets_kept"],
        "masked_share": float(np.mean(masked)) if masked else None,
        "generation_share": float(np.mean(generated)) if generated else None,
        "span_length_mean": sum(k * n for k, n in spans.items()) / num_spans if spans else None,
        "span_length_histogram": {str(k): spans[k] / num_spans for k in sorted(spans)},
        "tokens_per_source": dict(tokens),
    }


def _sources_of(source: Any, place: int) -> Iterable[tuple[int, int, int, Sample]]:
    """Of each sample, from what it was made of: tokens of text, how many of them are hidden, and
    how many blanks end in `eop`."""
    if not isinstance(source, GLMDataset):
        for document, sample in source.draw(place):
            hidden = source.target_length(document)
            yield len(sample.tokens), hidden, 1, sample
        return
    for part, sample in source.draw(place)[2]:
        size, overhead = len(part.places), len(sample.tokens) - len(part.places)
        is_open = sample.objective == Objective.GMASK
        num_blanks = overhead if is_open else overhead // 2
        hidden = size - (sample.context_length - num_blanks)
        yield size, hidden, 0 if is_open else num_blanks, sample


def _span_lengths(sample: Sample, eop: int) -> list[int]:
    closings = np.flatnonzero(sample.labels[sample.context_length :] == eop)
    return (np.diff(closings, prepend=-1) - 1).tolist()
