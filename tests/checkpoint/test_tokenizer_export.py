"""The tokenizer that an export carries against the one that training uses."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.hugging_face_writer import ExportedTokenizer
from megatron_glm.checkpoint.tokenizer_export import export_tokenizer, read_tokenizer
from megatron_glm.data.codecs import build_codec
from tests.checkpoint.building import (
    SPECIAL_IDS,
    MemorySource,
    remote_code_in,
    write_hugging_face,
)
from tests.data.codecs.models import CHINESE, bpe, ice_text_model, sentence_piece

KINDS = {
    "tokenizers": ("HuggingFaceTokenizer", None),
    "tokenizers with some special tokens": ("HuggingFaceTokenizer", None),
    "sentencepiece": ("SentencePieceTokenizer", None),
    "ice collapsed": ("IceTokenizer", "collapsed"),
    "ice whitespace": ("IceTokenizer", "whitespace"),
}
TEXTS = [
    "Hello world", " leading and trailing ", "two  spaces   three\n\nnew lines\n\ttab", "",
    CHINESE, "def f(x):\n        return x  # é 🙂\n", "a" * 90 + " " * 90 + "b", "</s> <unk> <n>",
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """The codec and the exported tokenizer of one file."""
    folder = tmp_path_factory.mktemp("tokenizer")
    kind, scheme = KINDS[request.param]
    model = folder / "model"
    if kind == "HuggingFaceTokenizer":
        bpe(specials=["<eod>", "[MASK]"] if "some" in request.param else []).save(str(model))
    else:
        model.write_bytes(ice_text_model() if kind == "IceTokenizer" else sentence_piece())
    codec = build_codec(kind, model, scheme)
    write_hugging_face(folder / "hf", MemorySource(), export_tokenizer(codec))
    with remote_code_in(folder / "modules"):
        yield codec, AutoTokenizer.from_pretrained(
            folder / "hf", trust_remote_code=True, local_files_only=True
        )


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_training(pair, text):
    codec, tokenizer = pair
    ids = codec.encode(text)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    assert tokenizer.decode(ids) == codec.decode(ids)


def test_special_tokens_have_their_ids(pair):
    codec, tokenizer = pair
    for name, token_id in codec.specials.items():
        assert tokenizer.convert_tokens_to_ids(name) == token_id
        assert tokenizer.decode([token_id]) == name
        assert tokenizer.decode([token_id], skip_special_tokens=True) == ""
    assert tokenizer.pad_token_id == codec.specials["<pad>"]
    assert tokenizer.vocab_size == codec.vocab_size


def test_prompts_get_a_mask_if_they_have_none_and_sop(pair):
    codec, tokenizer = pair
    gmask, mask, sop = (codec.specials[name] for name in ("[gMASK]", "[MASK]", "<sop>"))
    assert tokenizer("Hello world").input_ids == [*codec.encode("Hello world"), gmask, sop]
    # The space before a mask is left to what fills it.
    ids = [*codec.encode("one"), mask, *codec.encode(" two")]
    assert tokenizer("one [MASK] two").input_ids == [*ids, sop]
    assert tokenizer("one [MASK] two<sop>").input_ids == [*ids, sop]


def test_blanks_are_filled_in_their_places(pair):
    codec, tokenizer = pair
    s = codec.specials
    context = [*codec.encode("one"), s["[MASK]"], *codec.encode(" two"), s["[sMASK]"]]
    first, second = codec.encode(" x"), codec.encode(" yy")
    ids = [s["<pad>"], *context, s["<sop>"], *first, s["<sop>"], *second, s["<eop>"], s["<pad>"]]
    expected = codec.decode([*codec.encode("one"), *first, *codec.encode(" two"), *second])
    assert tokenizer.fill_blanks(ids) == expected
    only_first = tokenizer.fill_blanks(ids[: 2 + len(context) + len(first)])
    assert only_first.endswith("[sMASK]")


def test_a_saved_tokenizer_is_the_same(pair, tmp_path):
    _, tokenizer = pair
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(
        tmp_path / "saved", trust_remote_code=True, local_files_only=True
    )
    for text in (*TEXTS, "a [MASK] b"):
        assert again(text).input_ids == tokenizer(text).input_ids
    assert Path(again.vocab_file).name == "glm_text.model"


def test_an_export_gives_its_tokenizer_back(pair):
    codec, tokenizer = pair
    folder = Path(tokenizer.vocab_file).parent
    assert read_tokenizer(folder, codec.vocab_size) == export_tokenizer(codec)


CARRIED = ExportedTokenizer(b"model", "tokenizers", SPECIAL_IDS, {})


def test_an_export_without_a_tokenizer_gives_none(tmp_path):
    assert read_tokenizer(write_hugging_face(tmp_path / "hf", MemorySource()), 64) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(kind="pickle"), "kind 'pickle'"),
        (lambda c: c.update(kind=[]), "kind \\[\\]"),
        (lambda c: c.update(kind="sentencepiece"), "with options {}"),
        (lambda c: c.update(kind="sentencepiece", options={
            "offset": "0", "whitespace": True, "newlines": True}), "offset is '0', not int"),
        (lambda c: c.pop("special_ids"), "special_ids must give"),
        (lambda c: c["special_ids"].pop("<sop>"), "special_ids must give"),
        (lambda c: c["special_ids"].update({"<sop>": 64}), "ids below 64"),
        (lambda c: c["special_ids"].update({"<sop>": True}), "ids below 64"),
        (lambda c: c["special_ids"].update({"<sop>": 57}), "not what conversion.json recorded"),
        (lambda c: c.pop("tokenizer_class"), "which conversion.json recorded"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused(tmp_path, change, message):
    folder = write_hugging_face(tmp_path / "hf", MemorySource(), CARRIED)
    record = {"target": {"tokenizer_sha256": CARRIED.sha256}, "settings": {}, "tensors": {}}
    (folder / "conversion.json").write_text(json.dumps(record))
    assert read_tokenizer(folder, 64) == CARRIED
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json: .*{message}"):
        read_tokenizer(folder, 64)


def test_another_or_a_missing_tokenizer_model_is_refused(tmp_path):
    folder = write_hugging_face(tmp_path / "hf", MemorySource(), CARRIED)
    record = {"target": {"tokenizer_sha256": CARRIED.sha256}, "settings": {}, "tensors": {}}
    (folder / "conversion.json").write_text(json.dumps(record))
    (folder / "glm_text.model").write_bytes(b"modem")
    with pytest.raises(CheckpointError, match="glm_text.model is not what conversion.json"):
        read_tokenizer(folder, 64)
    (folder / "glm_text.model").unlink()
    with pytest.raises(CheckpointError, match="glm_text.model: cannot be read"):
        read_tokenizer(folder, 64)
