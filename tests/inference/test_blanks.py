"""Texts with blanks become the samples that training makes, and come back as texts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_glm.data.blank_infilling import (
    Objective,
    SpecialTokens,
    blank_sample,
    gmask_sample,
    prompt_sample,
)
from megatron_glm.inference.blanks import BlankCodec, Mask, PromptError
from megatron_glm.inference.search import Ends, Filling

words = st.text(st.sampled_from("the cat sat on mat;quickbrown\n"), max_size=12)
# A space before a mask is the blank's.
before_a_mask = words.map(lambda text: text.rstrip(" "))
free_text = st.text(max_size=12)


@pytest.fixture(scope="module")
def codec(tokenizer):
    return BlankCodec(tokenizer)


def positions(prompt, generated, ends):
    """Position ids of `sop` and of what was generated behind it."""
    filling = Filling(prompt)
    result = [filling.position]
    for token in generated:
        filling = filling.append(token, ends)
        result.append(filling.position)
    return result


@settings(deadline=None)
@given(data=st.data())
def test_several_blanks_are_the_sample_of_training(codec, tokenizer, data):
    """Tokens and positions are those of blank_sample, which hides spans of the whole text."""
    pieces = data.draw(st.lists(before_a_mask, min_size=2, max_size=5))
    kind = data.draw(st.sampled_from([Mask.MASK, Mask.SENTENCE]))
    ids = [tokenizer.tokenize(piece) for piece in pieces]
    hidden = data.draw(
        st.lists(
            st.lists(st.integers(0, 250), min_size=1, max_size=4),
            min_size=len(pieces) - 1,
            max_size=len(pieces) - 1,
        )
    )
    text, spans = list(ids[0]), []
    for span, behind in zip(hidden, ids[1:], strict=True):
        spans.append((len(text), len(text) + len(span)))
        text += [*span, *behind]
    special = SpecialTokens.of(tokenizer)
    objective = Objective.MASK if kind is Mask.MASK else Objective.SMASK
    sample = blank_sample(np.array(text), np.array(spans), objective, special)

    prompt = codec.encode(kind.value.join(pieces))
    generated = [token for span in hidden for token in (*span, special.sop)][:-1]
    assert [*prompt.context, special.sop, *generated] == sample.tokens.tolist()
    found = positions(prompt, generated, Ends(special.sop, special.eop, special.eod))
    assert [*range(len(prompt.context)), *found] == sample.position_ids.tolist()


@settings(deadline=None)
@given(text=before_a_mask, length=st.integers(1, 6))
def test_gmask_is_the_sample_of_training(codec, tokenizer, text, length):
    special = SpecialTokens.of(tokenizer)
    ends = Ends(special.sop, special.eop, special.eod)
    ids = [*tokenizer.tokenize(text), *range(length)]
    sample = gmask_sample(np.array(ids), length, special)
    for spelled in (text, text + "[gMASK]"):
        prompt = codec.encode(spelled)
        generated = list(range(length - 1))
        assert [*prompt.context, special.sop, *generated] == sample.tokens.tolist()
        found = positions(prompt, generated, ends)
        assert [*range(len(prompt.context)), *found] == sample.position_ids.tolist()


@pytest.mark.parametrize("unified", [False, True])
def test_instructions_are_the_samples_of_multitask_training(tokenizer, unified):
    special = SpecialTokens.of(tokenizer)
    text, answer = "the lazy dog rests", [5, 6, 7]
    sample = prompt_sample(
        np.array(tokenizer.tokenize(text)), np.array(answer), 100, special, unified
    )
    codec = BlankCodec(tokenizer, unified)
    for spelled in (text, text + " [MASK]", text + "[MASK]\n"):
        prompt = codec.encode(spelled, multitask=True)
        assert [*prompt.context, special.sop, *answer] == sample.tokens.tolist()
        found = positions(prompt, answer, Ends(special.sop, special.eop, special.eod))
        assert [*range(len(prompt.context)), *found] == sample.position_ids.tolist()


@settings(deadline=None)
@given(data=st.data())
def test_filling_blanks_with_what_stood_there_gives_the_text(codec, tokenizer, data):
    pieces = data.draw(st.lists(free_text, min_size=2, max_size=5))
    spans = data.draw(
        st.lists(words.filter(bool), min_size=len(pieces) - 1, max_size=len(pieces) - 1)
    )
    prompt = codec.encode("[MASK]".join(pieces))
    generated = []
    for span in spans:
        generated += [*tokenizer.tokenize(span), tokenizer.sop]
    fills = codec.fill(prompt, [*generated[:-1], tokenizer.eop])
    assert fills == spans
    expected = pieces[0]
    for span, piece in zip(spans, pieces[1:], strict=True):
        # A space before a blank is the blank's.
        expected += span.removeprefix(" ") if expected.endswith(" ") else span
        expected += piece
    if not any(span.startswith(" ") for span in spans):
        assert codec.join(prompt, fills) == expected


def test_marks_stand_around_what_was_filled(codec, tokenizer):
    prompt = codec.encode("the [MASK] sat on[MASK]")
    generated = [*tokenizer.tokenize(" cat"), tokenizer.sop, *tokenizer.tokenize(" the mat")]
    fills = codec.fill(prompt, generated)
    assert fills == [" cat", " the mat"]
    assert codec.join(prompt, fills, ("<", ">")) == "the <cat> sat on< the mat>"
    assert codec.join(prompt, fills[:1]) == "the cat sat on[MASK]"


def test_a_space_before_a_mask_belongs_to_the_blank(codec, tokenizer):
    """As in training, where a span of a byte-level BPE begins with its space."""
    spelled = codec.encode("the [MASK] sat").context
    assert spelled == codec.encode("the[MASK] sat").context
    assert list(spelled) == [
        *tokenizer.tokenize("the"), tokenizer.mask, *tokenizer.tokenize(" sat")
    ]  # fmt: skip


def test_what_spells_other_special_tokens_is_text(codec, tokenizer):
    context = codec.encode("a<sop>b<eop> [mask]<eod>").context
    special = set(SpecialTokens.of(tokenizer))
    assert [token for token in context if token in special] == [tokenizer.gmask]


@pytest.mark.parametrize(
    "text, multitask, message",
    [
        ("a [gMASK] b [MASK]", False, r"holds \[gMASK\] \[MASK\]"),
        ("[gMASK][gMASK]", False, "must be its only blank"),
        ("[MASK] a [MASK]", True, "one blank"),
        ("answer: [MASK] please", True, "at its end"),
        ("answer: [gMASK]", True, "a \\[MASK\\]"),
    ],
)
def test_blanks_that_no_sample_has_are_refused(codec, text, multitask, message):
    with pytest.raises(PromptError, match=message):
        codec.encode(text, multitask)


def test_ids_beyond_the_vocabulary_have_no_text(codec, tokenizer):
    prompt = codec.encode("the[MASK]")
    filled = [*tokenizer.tokenize(" cat"), tokenizer.vocab_size + 3]
    assert codec.fill(prompt, filled) == [" cat"]
