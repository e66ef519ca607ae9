"""The layouts of samples, against those that the code which trained GLM-130B made.

`golden/blank_infilling.json` holds the outputs of that code (LargeScale) for 56 random inputs.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.blank_infilling import (
    Objective,
    SpecialTokens,
    blank_sample,
    gmask_sample,
    prompt_sample,
)
from megatron_glm.data.packing import pack_samples

GOLDEN = json.loads((Path(__file__).parent / "golden" / "blank_infilling.json").read_text())
SPECIAL = SpecialTokens(
    mask=GOLDEN["special"]["MASK"], gmask=GOLDEN["special"]["gMASK"],
    smask=GOLDEN["special"]["sMASK"], sop=GOLDEN["special"]["sop"],
    eop=GOLDEN["special"]["eop"], eod=GOLDEN["special"]["eod"], pad=0,
)


def sample_of(case):
    if case["kind"] == "blank":
        objective = Objective.MASK if case["mask_id"] == SPECIAL.mask else Objective.SMASK
        ids, spans = np.array(case["input_ids"]), np.array(case["spans"])
        return blank_sample(ids, spans, objective, SPECIAL)
    if case["kind"] == "gmask":
        return gmask_sample(np.array(case["input_ids"]), case["generation_length"], SPECIAL)
    return prompt_sample(
        np.array(case["prompt"]), np.array(case["target"]), case["pad_to"], SPECIAL,
        case["unified_positions"], least_prompt=case["pad_to"] // 4,
    )


def test_there_are_56_golden_layouts():
    assert len(GOLDEN["cases"]) == 56
    assert {case["kind"] for case in GOLDEN["cases"]} == {"blank", "gmask", "multitask"}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_layout_is_that_of_the_original(case):
    sample = sample_of(case)
    length = len(case["tokens"])
    packed = pack_samples([sample], 0, length, 4, SPECIAL.pad)

    np.testing.assert_array_equal(packed["tokens"], case["tokens"])
    np.testing.assert_array_equal(packed["labels"], case["targets"])
    np.testing.assert_array_equal(packed["loss_mask"], case["loss_mask"])
    # Positions of padding are nothing: the original counts on in some layouts, and not in others.
    used = len(sample.tokens)
    np.testing.assert_array_equal(packed["position_ids"][:used], case["position_ids"][:used])
    assert sample.context_length == case["prefix_length"]


@st.composite
def blanks(draw):
    """Text of distinct tokens, and disjoint spans of it in random order."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), max_size=12))
    spans, place = [], 0
    for gap, length in lengths:
        spans.append((place + gap, place + gap + length))
        place += gap + length
    size = max(1, place + draw(st.integers(0, 6)))
    ids = 2000 + np.arange(size)
    order = draw(st.permutations(range(len(spans))))
    return ids, np.array([spans[i] for i in order], dtype=np.int64).reshape(-1, 2)


@given(blanks())
def test_every_token_is_in_the_context_or_a_target_and_in_its_place(case):
    ids, spans = case
    sample = blank_sample(ids, spans, Objective.MASK, SPECIAL)
    context = sample.tokens[: sample.context_length]
    fillings = sample.labels[sample.context_length :]

    # Reading the fillings into the blanks, in the order of the blanks, gives the text back.
    pieces = np.split(fillings, np.flatnonzero(fillings == SPECIAL.eop) + 1)[:-1]
    positions = sample.position_ids[sample.context_length :]
    of_blank, read = {}, 0
    for piece in pieces:
        assert len(set(positions[read : read + len(piece)])) == 1
        of_blank[positions[read]] = piece[:-1]
        read += len(piece)
    text = [
        of_blank[place] if token == SPECIAL.mask else [token] for place, token in enumerate(context)
    ]
    np.testing.assert_array_equal(np.concatenate(text), ids)

    assert len(sample.tokens) == len(ids) + 2 * len(spans)
    assert sample.loss_mask.sum() == len(fillings)
    # In the filled part a token is the label before it, or opens a filling.
    tokens = sample.tokens[sample.context_length :]
    is_open = tokens == SPECIAL.sop
    np.testing.assert_array_equal(tokens[1:][~is_open[1:]], fillings[:-1][~is_open[1:]])
    assert is_open.sum() == len(spans)


@given(st.integers(1, 60), st.data())
def test_gmask_hides_the_end_and_loses_nothing(size, data):
    ids = 2000 + np.arange(size)
    hidden = data.draw(st.integers(1, size))
    sample = gmask_sample(ids, hidden, SPECIAL)
    np.testing.assert_array_equal(sample.tokens[: size - hidden], ids[: size - hidden])
    np.testing.assert_array_equal(sample.labels[sample.loss_mask == 1], ids[size - hidden :])
    np.testing.assert_array_equal(sample.position_ids, np.arange(size + 1))


def test_a_target_is_not_cut_unless_asked_for():
    sample = prompt_sample(np.arange(10), np.arange(20, 24), 7, SPECIAL)
    np.testing.assert_array_equal(sample.tokens[:2], [0, SPECIAL.mask])
    np.testing.assert_array_equal(sample.labels[2:], [20, 21, 22, 23, SPECIAL.eop])
    with pytest.raises(ValueError, match="a target of 4 tokens does not fit in 5"):
        prompt_sample(np.arange(10), np.arange(20, 24), 5, SPECIAL)
