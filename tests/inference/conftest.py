import pytest

from megatron_glm.data.codecs.training import train_byte_level_bpe
from megatron_glm.data.tokenizer import build_tokenizer
from tests.inference.building import VOCAB_SIZE


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE of a few words."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    text = "the cat sat on the mat; the quick brown fox jumps over the lazy dog and then rests "
    path.write_bytes(train_byte_level_bpe([text * 3], 290))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_file)
    assert tokenizer.vocab_size <= VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="session")
def specials(tokenizer):
    return tokenizer._tokenizer.specials
