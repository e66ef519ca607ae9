"""Text in, the same text out, and no special token that nobody asked for."""

import hashlib
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.tokenizers import MegatronTokenizerBase
from tokenizers import Tokenizer, models, processors, trainers

from megatron_glm.data.codecs import build_codec
from megatron_glm.data.codecs.base import SPECIAL_TOKENS
from megatron_glm.data.codecs.training import train_sentence_piece
from megatron_glm.data.tokenizer import build_tokenizer
from megatron_glm.errors import GLMError
from tests.data.codecs.models import bpe, ice_text_model, python_sources, sentence_piece

TEXTS = {
    "chinese": "机器学习，是人工智能的一个分支。你好！「引号」",
    "english": "It's a truth universally acknowledged, that 3.14 isn't 22/7 -- naïve façade.",
    "code": "def f(x):\n\tif x:\n        return {'a': [1, 2]}  # done\n\n\n",
    "emoji": "👩‍👩‍👧‍👦 🇨🇳 ❤️ 🙂🙃",
    "long white space": "a" + " " * 300 + "b" + "\n" * 200 + "\t" * 100 + "c   ",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f\u200b\u2028\ufeff",
    "rare": "𠜎 𝔘𝔫𝔦 ﷽ ẛ̣ \U0010fffd",
    "empty": "",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    bpe().save(str(folder / "tokenizer.json"))
    model = train_sentence_piece(python_sources(6), 700)
    (folder / "lossless.model").write_bytes(model)
    (folder / "ice_text.model").write_bytes(ice_text_model())
    return folder


@pytest.fixture(scope="module")
def hugging_face(files):
    return build_tokenizer("HuggingFaceTokenizer", files / "tokenizer.json")


@pytest.fixture(scope="module")
def lossless(files):
    return build_tokenizer("SentencePieceTokenizer", files / "lossless.model")


@pytest.fixture(scope="module")
def ice(files):
    return build_tokenizer("IceTokenizer", files / "ice_text.model")


@pytest.fixture(scope="module")
def ice_code(files):
    return build_tokenizer("IceTokenizer", files / "ice_text.model", "whitespace")


ALL = ["hugging_face", "lossless", "ice", "ice_code"]


@pytest.fixture
def tokenizer(request):
    return request.getfixturevalue(request.param)


every_kind = pytest.mark.parametrize("tokenizer", ALL, indirect=True)
lossless_kinds = pytest.mark.parametrize("tokenizer", ["hugging_face", "lossless"], indirect=True)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@lossless_kinds
def test_round_trip(tokenizer, text):
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


@given(st.text())
def test_round_trip_of_any_text(hugging_face, text):
    assert hugging_face.detokenize(hugging_face.tokenize(text)) == text


@every_kind
def test_batches_have_the_ids_of_single_texts(tokenizer):
    codec = tokenizer._tokenizer
    texts = [*TEXTS.values(), *python_sources(3)]
    for text, ids in zip(texts, codec.encode_batch(texts), strict=True):
        assert ids.dtype == codec.dtype
        assert ids.tolist() == tokenizer.tokenize(text)


@every_kind
def test_special_tokens_in_a_corpus_are_text(tokenizer):
    text = "".join(f"x {name} " for name in tokenizer._tokenizer.specials)
    ids = tokenizer.tokenize(text)
    assert not set(ids) & set(tokenizer._tokenizer.specials.values())
    (batch,) = tokenizer._tokenizer.encode_batch([text])
    assert batch.tolist() == ids


@every_kind
def test_special_tokens_in_a_prompt_are_special(tokenizer):
    ids = tokenizer.tokenize("Hello [MASK] world[gMASK]<sop>", parse_special=True)
    assert ids == [
        *tokenizer.tokenize("Hello "), tokenizer.mask, *tokenizer.tokenize(" world"),
        tokenizer.gmask, tokenizer.sop,
    ]
    assert "[MASK]" in tokenizer.detokenize(ids)
    assert "[MASK]" not in tokenizer.detokenize(ids, skip_special_tokens=True)


@every_kind
def test_every_special_token_has_an_id_of_its_own_inside_the_vocabulary(tokenizer):
    ids = [tokenizer.mask, tokenizer.gmask, tokenizer.smask, tokenizer.eod, tokenizer.sop,
           tokenizer.eop, tokenizer.pad]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert max(ids) < tokenizer.vocab_size
    assert max(tokenizer.tokenize(TEXTS["rare"])) < tokenizer.vocab_size
    assert max(tokenizer.vocab.values()) < tokenizer.vocab_size


@every_kind
def test_is_a_tokenizer_of_megatron_whose_cache_key_has_no_path(tokenizer, tmp_path):
    assert isinstance(tokenizer, MegatronTokenizerBase)
    codec = tokenizer._tokenizer
    copy = tmp_path / "elsewhere"
    copy.write_bytes(codec.path.read_bytes())
    other = build_tokenizer(codec.tokenizer_type, copy, codec.text_scheme)
    assert other.unique_identifiers == tokenizer.unique_identifiers
    assert tokenizer.fingerprint == {
        "type": codec.tokenizer_type,
        "sha256": hashlib.sha256(copy.read_bytes()).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "text_scheme": codec.text_scheme,
    }
    json.dumps(tokenizer.fingerprint)


def test_hugging_face_specials_are_kept_where_the_file_has_them(tmp_path):
    bpe(specials=["<pad>", "[MASK]"]).save(str(tmp_path / "t.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "t.json")
    assert (tokenizer.pad, tokenizer.mask) == (600, 601)
    assert sorted({tokenizer.gmask, tokenizer.smask, tokenizer.eod}) == [602, 603, 604]
    assert tokenizer.vocab_size == 607


def test_hugging_face_file_that_truncates_and_adds_tokens_does_neither_here(tmp_path):
    tokenizer = bpe(specials=["[CLS]"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    tokenizer.save(str(tmp_path / "t.json"))
    text = TEXTS["english"]
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "t.json")
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_hugging_face_word_level_vocabulary_with_a_mask_token_of_its_own(tmp_path):
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.train_from_iterator(
        ["a b c"], trainers.WordPieceTrainer(special_tokens=["[UNK]", "[MASK]"])
    )
    inner.save(str(tmp_path / "t.json"))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tmp_path / "t.json")
    assert tokenizer.mask == 1
    assert 1 not in tokenizer.tokenize("a [MASK] b")


def test_sentence_piece_specials_that_text_could_spell_become_unreachable(tmp_path):
    (tmp_path / "t.model").write_bytes(sentence_piece(user_defined_symbols=["[MASK]", "<pad>"]))
    tokenizer = build_tokenizer("SentencePieceTokenizer", tmp_path / "t.model")
    assert (tokenizer.mask, tokenizer.pad) == (3, 4)
    assert not {3, 4} & set(tokenizer.tokenize("a [MASK] b <pad>"))


def test_sentence_piece_ids_are_those_of_the_library(files, lossless):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(files / "lossless.model"))
    for text in TEXTS.values():
        assert lossless.tokenize(text) == processor.encode(text)


def test_ice_ids_are_laid_out_as_published(files, ice, ice_code):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(files / "ice_text.model"))
    first = 20000 + processor.vocab_size()
    assert [ice.mask, ice.gmask, ice.smask, ice.eod, ice.sop, ice.eop] == [
        first + i for i in range(6)
    ]
    assert ice.pad == 20003
    assert ice.vocab_size == first + 8
    for text in TEXTS.values():
        assert ice.tokenize(text) == [20000 + i for i in processor.encode(text)]
    newline = 20000 + processor.piece_to_id("<n>")
    tab, blank = first + 8, first + 9 - 2
    assert ice_code.tokenize("\n\t\t") == [newline, tab, tab]
    assert ice_code.tokenize("  ") == [blank + 2]
    assert ice_code.tokenize("\n" + " " * 165) == [newline, blank + 80, blank + 80, blank + 5]
    assert ice_code.vocab_size == first + 8 + 1 + 79 + 256
    assert ice.detokenize([5, 19999]) == "<image_5><image_19999>"


def test_ice_text_schemes(ice, ice_code):
    code = TEXTS["code"] + "x"
    assert ice.detokenize(ice.tokenize(code)) == " ".join(code.split())
    assert ice_code.detokenize(ice_code.tokenize(code)) == code
    # One leading space, an unknown character: kept by the scheme for code alone.
    assert ice_code.detokenize(ice_code.tokenize(" x 𠜎")) == " x 𠜎"
    assert ice.detokenize(ice.tokenize(TEXTS["chinese"][:5])) == "机器学习,"
    assert ice.fingerprint != ice_code.fingerprint


def test_dtype_is_the_one_that_megatron_chooses(ice):
    from megatron.core.datasets.indexed_dataset import DType

    codec = ice._tokenizer
    for vocab_size in (1000, 65499, 65500, 150528):
        codec.vocab_size, kept = vocab_size, codec.vocab_size
        assert codec.dtype is DType.optimal_dtype(vocab_size)
        codec.vocab_size = kept
    assert codec.dtype is np.uint16


@pytest.mark.parametrize(
    ("kind", "content", "scheme", "message"),
    [
        ("GPT2Tokenizer", b"", None, "--tokenizer-type GPT2Tokenizer: unknown"),
        ("HuggingFaceTokenizer", b"{}", None, "not a tokenizer.json"),
        ("HuggingFaceTokenizer", None, None, "no such file"),
        ("HuggingFaceTokenizer", b"", "collapsed", "only IceTokenizer"),
        ("IceTokenizer", b"", "tabs", "--text-scheme tabs"),
        ("SentencePieceTokenizer", b"garbage", None, "not a SentencePiece model"),
        ("SentencePieceTokenizer", b"", None, "without pieces"),
    ],
)
def test_errors_name_the_flag(tmp_path, kind, content, scheme, message):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GLMError, match=message):
        build_codec(kind, path, scheme)


def test_ice_refuses_another_model(files):
    with pytest.raises(GLMError, match="has no piece <n>"):
        build_codec("IceTokenizer", files / "lossless.model")
