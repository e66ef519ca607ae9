"""Data that cannot be trained on is refused in one line that says what to do."""

import json
import os

import numpy as np
import pytest

from megatron_glm.data.builder import train_valid_test_datasets
from megatron_glm.data.config import DataError
from megatron_glm.data.indexed_files import FINGERPRINT_SUFFIX
from megatron_glm.errors import GLMError
from tests.data.corpora import TOKENIZER, make_config, random_documents, write_documents


@pytest.fixture
def prefix(tmp_path):
    return write_documents(tmp_path / "text", random_documents(0, 50, 100))


def first_sequence(prefix):
    train, _, _ = train_valid_test_datasets(
        make_config(prefix, sequence_length=256), [10, 0, 0]
    )
    return [train[index] for index in range(60)]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "longer"])
def test_a_damaged_file_is_named(prefix, suffix, damage):
    path = prefix + suffix
    if damage == "missing":
        os.remove(path)
    else:
        with open(path, "r+b") as stream:
            stream.seek(0, 2)
            stream.truncate(stream.tell() - 3) if damage == "truncated" else stream.write(b"123")
    with pytest.raises(GLMError) as caught:
        first_sequence(prefix)
    message = str(caught.value)
    assert path in message and "\n" not in message


def write_fingerprint(prefix, **changes):
    with open(prefix + FINGERPRINT_SUFFIX, "w") as stream:
        json.dump(TOKENIZER.fingerprint | changes, stream)


def test_the_right_tokenizer_is_let_through(prefix, caplog):
    write_fingerprint(prefix)
    first_sequence(prefix)
    assert "missing" not in caplog.text


def test_data_without_a_fingerprint_gives_a_warning(prefix, caplog):
    first_sequence(prefix)
    assert "cannot tell whether" in caplog.text


def test_another_tokenizer_is_refused(prefix):
    write_fingerprint(prefix, vocab_size=7)
    with pytest.raises(DataError, match=r"text.bin was made with another tokenizer than "
                       r"--tokenizer-model names \(vocab_size 7 against 1010\)"):
        first_sequence(prefix)


def test_a_fingerprint_that_is_not_json_is_refused(prefix):
    with open(prefix + FINGERPRINT_SUFFIX, "w") as stream:
        stream.write("{")
    with pytest.raises(DataError, match=r"tokenizer.json: not JSON"):
        first_sequence(prefix)


@pytest.mark.parametrize("dtype, bad", [(np.uint16, 1010), (np.int32, 2**30), (np.int32, -1)])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, dtype, bad):
    documents = random_documents(0, 50, 100)
    documents[33][0] = bad
    prefix = write_documents(tmp_path / "text", documents, dtype)
    with pytest.raises(DataError, match=f"text.bin: id {bad} in document 33 is outside the voc"):
        first_sequence(prefix)


def test_documents_without_tokens_are_refused(tmp_path):
    prefix = write_documents(tmp_path / "text", [[], [], []])
    with pytest.raises(DataError, match="text.bin: all its documents are empty"):
        first_sequence(prefix)
