"""Samples in one sequence: where each lies, what is visible, what is padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.blank_infilling import Objective, SpecialTokens, gmask_sample
from megatron_glm.data.packing import pack_samples, share_out, split_evenly

SPECIAL = SpecialTokens(mask=91, gmask=92, smask=93, sop=94, eop=95, eod=96, pad=97)


def visible(packed):
    """The mask that the integers of a batch stand for, spelled out: [s, s] bool."""
    size = len(packed["tokens"])
    mask = np.zeros((size, size), dtype=bool)
    begin = 0
    for end, context in zip(packed["sample_ends"], packed["context_lengths"], strict=True):
        for query in range(begin, end):
            for key in range(begin, end):
                mask[query, key] = key <= query or key < begin + context
        begin = max(begin, end)
    return mask


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
       st.integers(0, 9))
def test_samples_lie_end_to_end_and_see_only_themselves(sizes, padding):
    samples = [gmask_sample(np.full(max(size, hidden), number), hidden, SPECIAL)
               for number, (size, hidden) in enumerate(sizes)]
    total = sum(len(sample.tokens) for sample in samples)
    packed = pack_samples(samples, 7, total + padding, 8, SPECIAL.pad)

    owner = np.repeat(np.arange(len(samples)), [len(sample.tokens) for sample in samples])
    same = owner[:, None] == owner[None, :]
    mask = visible(packed)
    assert not mask[:total, total:].any() and not mask[total:, :total].any()
    assert (mask[:total, :total] <= same).all()
    # What is generated sees every token before it in its sample, so nothing of it is lost.
    assert (mask[:total, :total] >= (same & np.tri(total, dtype=bool))).all()

    np.testing.assert_array_equal(packed["sample_ends"][: len(samples)],
                                  np.cumsum([len(sample.tokens) for sample in samples]))
    assert (packed["sample_ends"][len(samples):] == total + padding).all()
    assert (packed["context_lengths"][len(samples):] == 0).all()
    assert (packed["objectives"][: len(samples)] == Objective.GMASK).all()
    assert (packed["objectives"][len(samples):] == -1).all()
    assert (packed["sources"][: len(samples)] == 7).all()
    assert (packed["sources"][len(samples):] == -1).all()
    assert (packed["tokens"][total:] == SPECIAL.pad).all()
    assert not packed["loss_mask"][total:].any() and not packed["position_ids"][total:].any()


def test_dtypes_and_shapes_of_a_sequence():
    packed = pack_samples([gmask_sample(np.arange(5), 2, SPECIAL)], 0, 8, 3, SPECIAL.pad)
    assert {name: (values.dtype.name, values.shape) for name, values in packed.items()} == {
        "tokens": ("int64", (8,)), "labels": ("int64", (8,)), "loss_mask": ("float32", (8,)),
        "position_ids": ("int64", (8,)), "context_lengths": ("int64", (3,)),
        "sample_ends": ("int64", (3,)), "objectives": ("int64", (3,)), "sources": ("int64", (3,)),
    }


@pytest.mark.parametrize("seq_length, max_samples", [(11, 3), (12, 1), (13, 2)])
def test_what_does_not_fit_is_refused(seq_length, max_samples):
    samples = [gmask_sample(np.arange(5), 2, SPECIAL)] * 2
    with pytest.raises(ValueError, match="2 samples of 12 tokens do not fit"):
        pack_samples(samples, 0, seq_length, max_samples, SPECIAL.pad)


@given(st.integers(0, 10**6), st.integers(1, 100))
def test_even_parts(total, num_parts):
    sizes = split_evenly(total, num_parts)
    assert sizes.sum() == total and len(sizes) == num_parts and np.ptp(sizes) <= 1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.data())
def test_shares_are_in_proportion_and_within_the_sizes(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    dealt = share_out(total, np.array(sizes))
    assert dealt.sum() == total
    assert (dealt <= sizes).all()
    assert (np.abs(dealt - total * np.array(sizes) / sum(sizes)) < 1).all()
