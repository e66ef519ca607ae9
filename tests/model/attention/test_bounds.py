"""Who sees whom, against loops that say it in words."""

import pytest
import torch
from hypothesis import given, settings

from megatron_glm.model.attention.bounds import (
    PerBatch,
    SampleRange,
    dense_mask,
    make_samples,
    sample_ranges,
    token_bounds,
    validate_samples,
)
from tests.model.attention.packs import packs, samples_from


def naive_visibility(seq_length, batch):
    """visible[b][query][key] from the definition, one pair at a time."""
    visible = torch.zeros(len(batch), seq_length, seq_length, dtype=torch.bool)
    for b, pack in enumerate(batch):
        start = 0
        for length, context in pack:
            for query in range(length):
                for key in range(length):
                    both_in_context = query < context and key < context
                    key_precedes = key <= query
                    visible[b, start + query, start + key] = both_in_context or key_precedes
            start += length
    return visible


@settings(max_examples=60, deadline=None)
@given(packs(max_length=30))
def test_dense_mask_equals_naive_visibility(pack):
    seq_length, batch = pack
    samples = samples_from(batch, num_rows=max(map(len, batch)) + 2)
    validate_samples(samples, seq_length)
    assert torch.equal(dense_mask(samples, seq_length), naive_visibility(seq_length, batch))


@settings(max_examples=60, deadline=None)
@given(packs(max_length=40))
def test_query_intervals_are_the_columns_of_the_mask(pack):
    seq_length, batch = pack
    bounds = token_bounds(samples_from(batch), seq_length)
    query = torch.arange(seq_length)
    seen_by = (query >= bounds.query_start[..., None]) & (query < bounds.query_end[..., None])
    assert torch.equal(seen_by.mT, naive_visibility(seq_length, batch))


@settings(max_examples=60, deadline=None)
@given(packs(max_length=40))
def test_intervals_grow_along_the_sequence(pack):
    seq_length, batch = pack
    for ends in token_bounds(samples_from(batch), seq_length):
        assert ends.dtype == torch.int32
        assert (ends.diff(dim=1) >= 0).all()


def test_a_written_out_mask():
    # Two samples, [a b|c] and [d], and one token of padding.
    mask = dense_mask(samples_from([[(3, 2), (1, 1), (1, 0)]]), 5)[0]
    assert mask.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_sample_ranges_leave_out_unused_rows():
    samples = samples_from([[(3, 2), (2, 0)], [(5, 5)]], num_rows=4)
    assert sample_ranges(samples) == [
        [SampleRange(0, 2, 3), SampleRange(3, 3, 5)],
        [SampleRange(0, 5, 5)],
    ]


@pytest.mark.parametrize(
    ("contexts", "ends", "message"),
    [
        ([1, 0], [3, 4], "end at 4 and the sequence has 5 tokens"),
        ([1, 0], [3, 7], "end at 7 and the sequence has 5 tokens"),
        ([4, 0], [3, 5], r"sample 0 has context length 4: must lie in \[0, 3\]"),
        ([0, -1], [3, 5], r"sample 1 has context length -1: must lie in \[0, 2\]"),
        ([0, 0], [5, 3], "sample 1 ends at 3, before it starts at 5"),
        ([0, 1], [5, 5], r"sample 1 has context length 1: must lie in \[0, 0\]"),
    ],
)
def test_bad_samples_are_refused_by_position(contexts, ends, message):
    with pytest.raises(ValueError, match=message):
        validate_samples(make_samples(torch.tensor([contexts]), torch.tensor([ends])), 5)


def test_other_layouts_are_refused():
    with pytest.raises(TypeError, match="must be torch.int32"):
        validate_samples(torch.zeros(1, 2, 3, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match=r"\(1, 3\): must be \[batch, 2"):
        validate_samples(torch.zeros(1, 3, dtype=torch.int32), 5)


def test_what_is_made_of_samples_is_made_once_a_batch():
    calls = []
    make = PerBatch(lambda samples, length: calls.append(samples.tolist()) or len(calls), 2)
    first = samples_from([[(3, 2), (2, 0)]])
    assert [make(first, 5), make(first.detach(), 5), make(first, 5)] == [1, 1, 1]
    second = first.clone()
    assert make(second, 5) == 2
    assert make(first, 5) == 1
    first[0, 0, 0] = 1
    assert make(first, 5) == 3
    assert calls[-1] == first.tolist()
    # Another length, and samples that more recent ones have displaced, are made anew.
    assert [make(first, 6), make(second, 5)] == [4, 5]


def test_memory_of_remembered_samples_is_not_reused():
    make = PerBatch(lambda samples, length: samples.clone(), 3)
    for index in range(50):
        # Each is freed at once, and would otherwise leave its address to the next.
        samples = samples_from([[(5, index % 6)]])
        assert make(samples, 5).equal(samples)
        del samples


def test_samples_without_a_version_are_not_remembered():
    make = PerBatch(lambda samples, length: samples.clone())
    with torch.inference_mode():
        samples = samples_from([[(5, 3)]])
        assert make(samples, 5).equal(samples)
        samples[0, 0, 0] = 1
        assert make(samples, 5).equal(samples)
