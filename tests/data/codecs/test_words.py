"""The remembered words give the ids of the Rust tokenizer, every one of them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from megatron_glm.data.codecs import words
from megatron_glm.data.codecs.words import KNOWN_WORDS, WordEncoder
from tests.data.codecs.models import bpe, python_sources


@pytest.fixture(scope="module", params=range(len(KNOWN_WORDS)))
def tokenizer(request):
    return bpe(KNOWN_WORDS[request.param] if request.param else None)


def rust_ids(tokenizer, texts):
    return [e.ids for e in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def assert_same_ids(tokenizer, encoder, texts):
    for text, ours, theirs in zip(
        texts, encoder.encode_batch(texts), rust_ids(tokenizer, texts), strict=True
    ):
        assert ours.tolist() == theirs, text


def test_ids_of_characters_of_all_of_unicode_between_others(tokenizer):
    # Shuffled, so that every kind of character meets every other; 0xD800 to 0xDFFF are no text.
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    characters = characters[:0x3400:3] + characters[0x3400::200]
    rng = random.Random(0)
    rng.shuffle(characters)
    mixed = [part for c in characters for part in (c, chr(rng.randrange(128)))]
    texts = ["".join(mixed[i : i + 100]) for i in range(0, len(mixed), 100)]
    assert_same_ids(tokenizer, WordEncoder.build(tokenizer, np.uint16), texts)


def test_ids_of_a_corpus(tokenizer):
    sources = python_sources(20)
    assert_same_ids(tokenizer, WordEncoder.build(tokenizer, np.uint16), sources)


@pytest.fixture(scope="module")
def gpt2():
    tokenizer = bpe()
    return tokenizer, WordEncoder.build(tokenizer, np.uint16)


@settings(max_examples=300)
@given(st.lists(st.text() | st.text("ab1'sStre .\n\t\r\x1c\x85\xa0é中🙂ſ"), max_size=5))
def test_ids_of_any_text(gpt2, texts):
    assert_same_ids(*gpt2, texts)


def test_character_that_libraries_classify_differently_is_left_to_rust(gpt2, monkeypatch):
    tokenizer, _ = gpt2
    # As if Python's Unicode did not know that an e with an accent is a letter.
    real = words._ranges
    monkeypatch.setattr(
        words, "_ranges",
        lambda category, end: real(category, 0xC0) if end > 128 else real(category, end),
    )
    words._finder.cache_clear()
    try:
        encoder = WordEncoder.build(tokenizer, np.uint16)
        assert_same_ids(tokenizer, encoder, ["caf\xe9 x", "\xe9t\xe9", "plain"])
        assert encoder._differing == {"\xe9"}
    finally:
        words._finder.cache_clear()


def test_forgetting_changes_no_id(monkeypatch):
    monkeypatch.setattr(words, "MAX_WORDS", 50)
    tokenizer = bpe()
    encoder = WordEncoder.build(tokenizer, np.uint16)
    for text in python_sources(5):
        assert_same_ids(tokenizer, encoder, [text])
        assert len(encoder._remembered) <= 50


def with_normalizer(tokenizer):
    tokenizer.normalizer = normalizers.NFC()


def with_prefix_space(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_other_words(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def with_added_words(tokenizer):
    tokenizer.add_tokens([AddedToken("def main", normalized=False)])


@pytest.mark.parametrize(
    "change", [with_normalizer, with_prefix_space, with_other_words, with_added_words]
)
def test_refuses_a_tokenizer_that_does_more_than_cut_words(change):
    tokenizer = bpe()
    change(tokenizer)
    assert WordEncoder.build(tokenizer, np.uint16) is None
