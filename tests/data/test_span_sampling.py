"""Lengths and places of spans, against the published process and a naive count."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.span_sampling import (
    expected_spans,
    place_spans,
    sample_sentences,
    sample_span_lengths,
    span_length_distribution,
)

# Measured on the trainer of GLM-130B, on samples of 500 tokens; see test_blank_infilling.
PUBLISHED = json.loads(
    (Path(__file__).parent / "golden" / "blank_infilling.json").read_text()
)["sampler_statistics"]["mask"]
NOWHERE = np.zeros(0, dtype=np.int64)


def published_process(rng, num_tokens, mask_ratio=0.15):
    """Draws lengths one by one until they cover the share, as the original does."""
    cumulative = span_length_distribution(3.0)
    lengths = []
    while sum(lengths) < int(mask_ratio * num_tokens):
        lengths.append(1 + np.searchsorted(cumulative, rng.random_sample()))
    return lengths


def test_the_distribution_is_the_one_measured_on_the_original():
    probabilities = np.diff(span_length_distribution(3.0), prepend=0)
    num_spans = PUBLISHED["samples"] * PUBLISHED["spans_per_sample_mean"]
    for expected, measured in zip(probabilities, PUBLISHED["span_length_hist"], strict=False):
        assert measured == pytest.approx(expected, abs=4 * (expected / num_spans) ** 0.5)


def test_the_number_of_spans_is_that_of_the_published_process():
    rng = np.random.RandomState(0)
    # A corrupted sample of l tokens holds n + 2 * spans = l; at n = 500 the original has 24.24.
    length = 500 + 2 * PUBLISHED["spans_per_sample_mean"]
    assert expected_spans(length, 0.15, 3.0) == pytest.approx(24.24, abs=0.15)
    counts = [len(published_process(rng, 500)) for _ in range(2000)]
    assert np.mean(counts) == pytest.approx(expected_spans(length, 0.15, 3.0), abs=0.15)


def test_lengths_have_the_published_histogram_and_cover_an_even_share():
    rng = np.random.RandomState(1)
    draws = np.stack([sample_span_lengths(rng, 23, 466, 3.0) for _ in range(4000)])
    histogram = np.bincount(draws.ravel(), minlength=12)[1:11] / draws.size
    for share, published in zip(histogram, PUBLISHED["span_length_hist"], strict=True):
        assert share == pytest.approx(published, abs=0.006)
    original = [sum(published_process(rng, 466)) for _ in range(2000)]
    assert draws.sum(axis=1).std() < 1.5 * np.std(original)


@given(st.integers(1, 30), st.integers(0, 300), st.integers(0, 2**31))
def test_spans_are_disjoint_apart_and_inside(num_spans, spare, seed):
    num_tokens = 2 * num_spans - 1 + spare
    rng = np.random.RandomState(seed)
    lengths = sample_span_lengths(rng, num_spans, num_tokens, 3.0)
    spans = place_spans(rng, lengths, num_tokens, NOWHERE)
    assert len(spans) == num_spans
    assert spans[0, 0] >= 0 and spans[-1, 1] <= num_tokens
    assert (spans[1:, 0] > spans[:-1, 1]).all()
    np.testing.assert_array_equal(spans[:, 1] - spans[:, 0], lengths)


@given(st.integers(1, 12), st.integers(0, 60), st.data())
def test_no_span_covers_an_end_of_document(num_spans, spare, data):
    num_tokens = 2 * num_spans - 1 + spare
    barred = np.array(sorted(data.draw(st.sets(st.integers(0, num_tokens - 1), max_size=20))), int)
    rng = np.random.RandomState(data.draw(st.integers(0, 1000)))
    lengths = sample_span_lengths(rng, num_spans, num_tokens, 3.0)
    spans = place_spans(rng, lengths, num_tokens, barred)
    covered = {place for start, end in spans for place in range(start, end)}
    assert not covered & set(barred.tolist())
    assert (spans[:, 1] > spans[:, 0]).all() and len(spans) <= num_spans
    assert (spans[1:, 0] > spans[:-1, 1]).all()
    if len(barred) == 0:
        assert len(spans) == num_spans


def test_places_are_uniform():
    """Apart from the ends of the sample, every token is masked equally often."""
    rng = np.random.RandomState(2)
    hits = np.zeros(100)
    for _ in range(20000):
        for start, end in place_spans(rng, rng.permutation([3, 1, 4]), 100, NOWHERE):
            hits[start:end] += 1
    middle = hits[8:-8] / 20000
    assert middle.mean() == pytest.approx(0.08, abs=0.004)
    assert middle.std() < 0.006


def test_a_moved_span_may_go_anywhere_that_is_free():
    rng = np.random.RandomState(3)
    barred = np.array([4, 5, 6])
    starts = [place_spans(rng, np.array([4]), 12, barred)[0, 0] for _ in range(500)]
    assert set(starts) == {0, 7, 8}


SENTENCES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(SENTENCES, st.sets(st.integers(0, 29)), st.integers(1, 6), st.integers(0, 1000))
def test_sentences_are_whole_and_cover_the_share(lengths, document_ends, max_spans, seed):
    stops = np.cumsum(lengths) - 1
    num_tokens = int(stops[-1]) + 1
    barred = stops[[i for i in document_ends if i < len(stops)]]
    sentence_ends = np.setdiff1d(stops, barred)
    spans = sample_sentences(
        np.random.RandomState(seed), sentence_ends, np.sort(barred), 0.15 * num_tokens, max_spans
    )
    assert len(spans) <= max_spans
    before = set(stops.tolist())
    for start, end in spans:
        assert start - 1 in before and end - 1 in set(sentence_ends.tolist())
        assert not any(start <= place < end for place in barred)
    ordered = spans[np.argsort(spans[:, 0])]
    assert (ordered[1:, 0] >= ordered[:-1, 1]).all()
    whole = sum(int(length) for length, stop in zip(lengths[1:], stops[1:], strict=True)
                if stop in set(sentence_ends.tolist()))
    if len(barred) == 0 and whole >= 0.5 * num_tokens:
        assert (spans[:, 1] - spans[:, 0]).sum() >= 0.15 * num_tokens or len(spans) == max_spans
