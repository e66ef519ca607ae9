"""Whatever the bytes, each document is taken exactly or counted as a reject."""

import gzip
import itertools
import json
import random
import re

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.preprocessing import blocks
from megatron_glm.data.preprocessing.blocks import Cursor, read_blocks
from megatron_glm.data.preprocessing.documents import Document, read_documents
from megatron_glm.data.preprocessing.inputs import find_inputs
from megatron_glm.data.preprocessing.sentences import split_sentences
from megatron_glm.errors import GLMError
from tests.data.test_indexed import damage

NUM_FUZZED = 5000
START = Cursor()
TEXTS = ["plain", 'quotes " and \\ and \n', "中文 🙂", "\x00\x1f", "x" * 300, "1", "[MASK]"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)


def read_all(path, start=START, text_documents="file"):
    """Documents and rejects of a file, and the cursors behind its blocks."""
    items, cursors = [], []
    for block in read_blocks(find_inputs([str(path)]), ["text"], text_documents, start):
        items += read_documents(block, ["text"])
        cursors.append(block.next)
    return items, cursors


def fuzzed_lines(rng):
    """Lines of JSON, some of them damaged."""
    records = [{"text": rng.choice(TEXTS), "n": [1.5, None]} for _ in range(rng.randrange(1, 8))]
    lines = [json.dumps(r, ensure_ascii=rng.random() < 0.5).encode() for r in records]
    return damage(rng, b"\n".join(lines) + b"\n") if rng.random() < 0.9 else b"\n".join(lines)


def expected_text(line):
    """The text of a line by the standard library, None where it has none."""
    try:
        record = json.loads(line.decode())
        record["text"].encode()
        return record["text"] or None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def test_fuzzed_json_is_taken_exactly_or_rejected(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "a.jsonl"
    taken = rejected = 0
    for _ in range(NUM_FUZZED):
        data = fuzzed_lines(rng)
        path.write_bytes(data)
        items, _ = read_all(path)
        lines = [(i, line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        assert [item.line for item in items] == [i for i, _ in lines]
        for item, (_, line) in zip(items, lines, strict=True):
            expected = expected_text(line)
            if isinstance(item, Document):
                assert item.texts == (expected,)
                taken += 1
            else:
                # The standard library reads more than JSON allows: NaN, Infinity, lone surrogates.
                assert expected is None or re.search(rb"NaN|Infinity|\\u[dD]", line)
                assert item.reason
                rejected += 1
    assert taken > NUM_FUZZED / 2 and rejected > NUM_FUZZED / 2


def test_deep_nesting_and_numbers_without_end_are_rejects_or_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"[" * 100000 + b"\n" + b'{"a":' * 100000 + b"\n" + b"9" * 100000 + b"\n"
                     + b'{"text": "good", "n": ' + b"9" * 5000 + b"}\n")
    items, _ = read_all(path)
    assert [item.line for item in items] == [1, 2, 3, 4]
    assert not any(isinstance(item, Document) for item in items[:3])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_fuzzed_compressed_file_is_an_error_or_the_same(tmp_path, suffix):
    lines = b"".join(json.dumps({"text": text * 3}).encode() + b"\n" for text in TEXTS * 5)
    compress = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }[suffix]
    parts = lines[:700], lines[700:]
    whole = b"".join(map(compress, parts))
    # A file may have lost or repeated whole members or frames: nothing in it would tell.
    plain = tmp_path / "plain.jsonl"
    possible = []
    for n in range(4):
        for order in itertools.product(parts, repeat=n):
            plain.write_bytes(b"".join(order))
            possible.append([item._replace(file="") for item in read_all(plain)[0]])
    path = tmp_path / f"a.jsonl{suffix}"
    errors = 0
    rng = random.Random(0)
    for _ in range(NUM_FUZZED // 5):
        path.write_bytes(damage(rng, whole))
        try:
            items, _ = read_all(path)
        except GLMError as error:
            assert f"--input {path}: cannot be read to its end" in str(error)
            errors += 1
        else:
            assert [item._replace(file="") for item in items] in possible
    assert errors > NUM_FUZZED // 5 * 0.8


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"])
def test_reading_goes_on_at_any_cursor(tmp_path, name):
    rng = random.Random(0)
    if name.endswith(".txt"):
        data = "\n\n".join(rng.choice(TEXTS) + str(i) for i in range(100)).encode()
    else:
        data = b"".join(json.dumps({"text": f"{rng.choice(TEXTS)}{i}"}).encode() + b"\n"
                        for i in range(100))
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path = tmp_path / name
    path.write_bytes(data)
    items, cursors = read_all(path, text_documents="blank-line")
    assert len(items) >= 100 and len(cursors) > 10
    assert cursors[-1] == Cursor(1)
    for cursor in cursors[:-1]:
        rest, _ = read_all(path, cursor, text_documents="blank-line")
        assert rest == [item for item in items if item.line > cursor.line]


@given(st.lists(st.lists(st.text("ab \t", min_size=1).filter(str.strip), min_size=1, max_size=3),
                max_size=8),
       st.integers(1, 60))
def test_paragraphs_are_the_runs_of_lines_that_are_not_blank(tmp_path_factory, paragraphs, size):
    folder = tmp_path_factory.mktemp("paragraphs")
    rng = random.Random(size)
    text = "".join("\n".join(lines) + "\n" + rng.choice(["\n", " \n", "\r\n\n"])
                   for lines in paragraphs)
    (folder / "a.txt").write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", size)
        items, _ = read_all(folder / "a.txt", text_documents="blank-line")
    assert [item.texts[0] for item in items] == ["\n".join(p).rstrip() for p in paragraphs]
    lines = text.split("\n")
    for item in items:
        assert item.texts[0].startswith(lines[item.line - 1].rstrip())


@given(st.text() | st.text("ab.?!。！”\") \n1"))
def test_sentences_lose_no_character(text):
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences) or text == ""


def test_sentences():
    text = 'Pi is 3.14. "Is it?" (It is.) Yes... 好。“真的？”他说。\nNext line\n\n'
    assert [s.strip() for s in split_sentences(text)] == [
        "Pi is 3.14.", '"Is it?"', "(It is.)", "Yes...", "好。", "“真的？”", "他说。", "Next line",
    ]
