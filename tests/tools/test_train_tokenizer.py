"""A new tokenizer has the size asked for, GLM's special tokens, and gives text back."""

import json

import pytest

from megatron_glm.data.codecs import build_codec
from megatron_glm.data.codecs.base import SPECIAL_TOKENS
from tests.data.codecs.models import CHINESE, python_sources
from tests.tools import forked

TOOL = "tools.train_tokenizer"
KINDS = {"HuggingFaceTokenizer": "t.json", "SentencePieceTokenizer": "t.model"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    texts = [text[i : i + 3000] for text in [*python_sources(10), CHINESE] for i in
             range(0, len(text), 3000)]
    path.write_text("{broken\n" + "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def train(corpus, folder, kind, vocab_size=700, *argv):
    return forked.run(
        TOOL, ["--input", corpus, "--tokenizer-type", kind, "--vocab-size", vocab_size,
               "--output", folder / "new" / KINDS[kind], *argv], folder / "log")


@pytest.mark.parametrize("kind", KINDS)
def test_trains_a_lossless_tokenizer_of_the_size_asked_for(corpus, tmp_path, kind):
    result = train(corpus, tmp_path, kind)
    assert result.code == 0, result.output
    assert f"1 bad documents were passed over; the last: {corpus} line 1 (" in result.output
    codec = build_codec(kind, tmp_path / "new" / KINDS[kind])
    assert codec.vocab_size == 700
    assert set(codec.specials) >= set(SPECIAL_TOKENS)
    for text in [*python_sources(12), CHINESE, "unseen: ψ𠜎🙂\x00\t" + " " * 500]:
        assert codec.decode(codec.encode(text)) == text
    # It has learned something: fewer tokens than bytes.
    text = python_sources(12)[-1]
    assert len(codec.encode(text)) < 0.6 * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_tokenizer(corpus, tmp_path, kind):
    assert train(corpus, tmp_path, kind).code == 0
    first = (tmp_path / "new" / KINDS[kind]).read_bytes()
    assert "exists" in train(corpus, tmp_path, kind).output
    assert train(corpus, tmp_path, kind, 700, "--overwrite").code == 0
    assert (tmp_path / "new" / KINDS[kind]).read_bytes() == first


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_key_is_the_reason_and_not_too_little_text(corpus, tmp_path, kind):
    result = train(corpus, tmp_path, kind, 700, "--json-keys", "content")
    assert result.code == 2
    assert f"--input {corpus}: none of " in result.output and "content" in result.output
    assert "--vocab-size" not in result.output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [200, 10_000_000])
def test_impossible_sizes_name_the_flag(corpus, tmp_path, kind, vocab_size):
    result = train(corpus, tmp_path, kind, vocab_size)
    assert result.code == 2
    assert f"--vocab-size {vocab_size}: " in result.output
    assert "Traceback" not in result.output
    assert not list((tmp_path).glob("new/*"))


def test_a_corpus_without_text_is_the_reason_and_makes_no_tokenizer(tmp_path):
    (empty := tmp_path / "empty.jsonl").touch()
    result = train(empty, tmp_path, "HuggingFaceTokenizer", 263)
    assert result.code == 2 and f"--input {empty}: holds no documents" in result.output
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize("argv, message", [
    (["--max-bytes", -3], "--max-bytes -3: at least 1"),
    (["--output", ".", "--overwrite"], "--output .: is a folder; name a file"),
    (["--output", "/proc/here/t.json"], "/proc/here: No such file or directory"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_read(corpus, tmp_path, argv, message):
    result = train(corpus, tmp_path, "HuggingFaceTokenizer", 700, *argv)
    assert result.code == 2 and message in result.output
    assert "read:" not in result.output and "Traceback" not in result.output


def test_max_bytes_takes_a_part_spread_over_the_corpus(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.jsonl").write_text(
            "".join(json.dumps({"text": f"word{i:02} " * 20}) + "\n" for _ in range(100)))
    result = forked.run(
        TOOL, ["--input", tmp_path, "--vocab-size", 263, "--output", tmp_path / "t.json",
               "--max-bytes", 100_000], tmp_path / "log")
    assert result.code == 0, result.output
