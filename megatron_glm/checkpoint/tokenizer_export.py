"""A tokenizer as a Hugging Face export carries it, out and back in."""

from pathlib import Path
from typing import Any, Protocol

from megatron_glm.checkpoint.errors import CheckpointError, CorruptFileError
from megatron_glm.checkpoint.hugging_face import read_json
from megatron_glm.checkpoint.hugging_face_writer import (
    TOKENIZER_CLASS,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
    ExportedTokenizer,
)
from megatron_glm.checkpoint.record import read_record

# Options of each kind of tokenizer, and their types.
_OPTIONS = {
    "tokenizers": {},
    "sentencepiece": {"offset": int, "whitespace": bool, "newlines": bool},
}
_SPECIALS = {"[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<pad>"}


class Codec(Protocol):
    """What is needed of `megatron_glm.data.codecs.Codec`, which this package does not import."""

    tokenizer_type: str
    text_scheme: str | None
    specials: dict[str, int]
    vocab: dict[str, int]

    def serialize(self) -> bytes: ...


def export_tokenizer(codec: Codec) -> ExportedTokenizer:
    """The file content and options with which `MegatronGLMTokenizer` gives the codec's ids."""
    if codec.tokenizer_type == "HuggingFaceTokenizer":
        kind, options = "tokenizers", {}
    else:
        is_ice = codec.tokenizer_type == "IceTokenizer"
        kind = "sentencepiece"
        options = {
            "offset": min(codec.vocab.values()) if is_ice else 0,
            "whitespace": codec.text_scheme == "whitespace",
            "newlines": is_ice,
        }
    return ExportedTokenizer(codec.serialize(), kind, dict(codec.specials), options)


def read_tokenizer(directory: Path, vocab_size: int) -> ExportedTokenizer | None:
    """The tokenizer that an export carries, None where it carries none of this repository's.

    vocab_size: rows of the model's embedding, more than any id. No code of the folder is run or
    taken over. CheckpointError says what is missing or damaged.
    """
    path = directory / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() else {}
    record = read_record(directory) or {"target": {}}
    recorded = record["target"].get("tokenizer_sha256")
    if config.get("tokenizer_class") != TOKENIZER_CLASS:
        if recorded is None:
            return None
        raise CheckpointError(
            f"{path}: is not that of {TOKENIZER_CLASS}, which conversion.json recorded; fetch all "
            "files, or give --tokenizer-model"
        )
    try:
        model = (directory / TOKENIZER_MODEL).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{directory / TOKENIZER_MODEL}: cannot be read ({error})") from None
    tokenizer = _checked(path, config, model, vocab_size)
    if recorded not in (None, tokenizer.sha256):
        raise CorruptFileError(
            f"{path}: it or {TOKENIZER_MODEL} is not what conversion.json recorded: a file was "
            "damaged or exchanged; fetch it again, or give --tokenizer-model"
        )
    return tokenizer


def _checked(
    path: Path, config: dict[str, Any], model: bytes, vocab_size: int
) -> ExportedTokenizer:
    kind, ids, options = config.get("kind"), config.get("special_ids"), config.get("options")
    types = _OPTIONS.get(kind) if isinstance(kind, str) else None
    if types is None or not isinstance(options, dict) or options.keys() != types.keys():
        raise CorruptFileError(f"{path}: a tokenizer of kind {kind!r} with options {options!r}")
    for name, wanted in types.items():
        if type(options[name]) is not wanted:
            raise CorruptFileError(f"{path}: {name} is {options[name]!r}, not {wanted.__name__}")
    if (
        not isinstance(ids, dict)
        or not ids.keys() >= _SPECIALS
        or not all(type(i) is int and 0 <= i < vocab_size for i in ids.values())
    ):
        raise CorruptFileError(
            f"{path}: special_ids must give {', '.join(sorted(_SPECIALS))} ids below {vocab_size}"
        )
    return ExportedTokenizer(model, kind, ids, options)
