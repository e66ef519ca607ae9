"""Which tokens become blanks: lengths and places of spans, as pure functions of a generator."""

from functools import cache

import numpy as np

MAX_SPAN_LENGTH = 39


@cache
def span_length_distribution(average: float) -> np.ndarray:
    """Cumulative probability of span lengths 1 to 39: Poisson(average) without 0 and the far tail.

    Returns [39] float64, ending in 1 (GLM paper, section 2.1.1).
    """
    lengths = np.arange(1, MAX_SPAN_LENGTH + 1)
    log_factorials = np.cumsum(np.log(lengths))
    weights = np.exp(lengths * np.log(average) - log_factorials)
    cumulative = np.cumsum(weights) / weights.sum()
    cumulative[-1] = 1.0
    return cumulative


def expected_spans(length: int, mask_ratio: float, average: float) -> float:
    """Spans per sample of the published process, in a corrupted sample of `length` tokens.

    It draws spans until they cover `mask_ratio` of the n tokens, so it overshoots by the mean
    excess of a renewal process, (E[x^2] / E[x] - 1) / 2; each span then adds two tokens to the n.
    """
    cumulative = span_length_distribution(average)
    lengths = np.arange(1, MAX_SPAN_LENGTH + 1)
    probabilities = np.diff(cumulative, prepend=0.0)
    mean = (probabilities * lengths).sum()
    overshoot = ((probabilities * lengths**2).sum() / mean - 1) / 2
    return float((mask_ratio * length + overshoot) / (mean + 2 * mask_ratio))


def sample_span_lengths(
    rng: np.random.RandomState, num_spans: int, num_tokens: int, average: float
) -> np.ndarray:
    """Draws span lengths that fit in `num_tokens` with a token between any two: [num_spans] int64.

    Each follows the published distribution. Together they are stratified (the i-th draw falls in
    the i-th of num_spans equal shares of it), so that a fixed number of spans covers nearly the
    same share of every sample, which the published process reaches by a varying number of spans.
    """
    uniform = (np.arange(num_spans) + rng.random_sample(num_spans)) / num_spans
    lengths = 1 + np.searchsorted(span_length_distribution(average), uniform, side="right")
    longest = (num_tokens + 1) // num_spans - 1
    return rng.permutation(np.minimum(lengths, longest))


def place_spans(
    rng: np.random.RandomState, lengths: np.ndarray, num_tokens: int, barred: np.ndarray
) -> np.ndarray:
    """Places spans of the given lengths at random, disjoint, with a token between any two.

    barred: [m] int64, ascending places that no span may cover (ends of documents).

    Returns [k, 2] int64, start and end, by ascending start. A span that meets a barred token is
    moved to a random free place, shortened where none is long enough, and left out where none is
    free at all.
    """
    free = num_tokens - int(lengths.sum()) - len(lengths) + 1
    gaps = np.sort(rng.randint(0, free + 1, size=len(lengths)))
    starts = gaps + np.cumsum(lengths + 1) - (lengths + 1)
    spans = np.stack((starts, starts + lengths), axis=1)
    if len(barred) == 0:
        return spans
    is_hit = np.searchsorted(barred, spans[:, 0]) < np.searchsorted(barred, spans[:, 1])
    if not is_hit.any():
        return spans
    return _move_spans(rng, spans[~is_hit], lengths[is_hit], num_tokens, barred)


def _move_spans(
    rng: np.random.RandomState,
    spans: np.ndarray,
    lengths: np.ndarray,
    num_tokens: int,
    barred: np.ndarray,
) -> np.ndarray:
    for length in lengths:
        taken = np.zeros(num_tokens, dtype=bool)
        taken[barred] = True
        for start, end in spans:
            taken[max(start - 1, 0) : end + 1] = True
        edges = np.flatnonzero(np.diff(taken, prepend=True, append=True))
        run_starts, run_ends = edges[::2], edges[1::2]
        if len(run_starts) == 0:
            break
        length = min(length, int((run_ends - run_starts).max()))
        choices = np.maximum(run_ends - run_starts - length + 1, 0)
        choice = rng.randint(choices.sum())
        run = np.searchsorted(np.cumsum(choices), choice, side="right")
        start = run_starts[run] + choice - (choices[:run].sum())
        spans = np.concatenate((spans, [[start, start + length]]))
    return spans[np.argsort(spans[:, 0])]


def sample_sentences(
    rng: np.random.RandomState,
    sentence_ends: np.ndarray,
    barred: np.ndarray,
    num_wanted: float,
    max_spans: int,
) -> np.ndarray:
    """Draws whole sentences until they cover `num_wanted` tokens.

    sentence_ends, barred: [m] int64, ascending places of tokens that end a sentence or a document.
    A sentence runs from behind either to the next sentence end, that included. One that is too
    short for max_spans of its length to suffice takes its neighbours along.

    Returns [k, 2] int64 in the order drawn, k <= max_spans; k = 0 where there is no whole sentence.
    """
    stops = np.union1d(sentence_ends, barred)
    is_sentence = np.isin(stops[1:], sentence_ends) & (np.diff(stops) > 0)
    starts, ends = stops[:-1][is_sentence] + 1, stops[1:][is_sentence] + 1

    spans: list[tuple[int, int]] = []
    is_free = np.ones(len(starts), dtype=bool)

    def joins(sentence: int, neighbour: int) -> bool:
        first, second = sorted((sentence, neighbour))
        return (
            0 <= first and second < len(starts) and bool(is_free[neighbour])
            and ends[first] == starts[second]
        )

    missing = num_wanted
    for first in rng.permutation(len(starts)).tolist():
        if missing <= 0 or len(spans) == max_spans:
            break
        if not is_free[first]:
            continue
        last = first
        shortest = missing / (max_spans - len(spans))
        while ends[last] - starts[first] < shortest:
            if joins(last, last + 1):
                last += 1
            elif joins(first, first - 1):
                first -= 1
            else:
                break
        is_free[first : last + 1] = False
        spans.append((starts[first], ends[last]))
        missing -= ends[last] - starts[first]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
