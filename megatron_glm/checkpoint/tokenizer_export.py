"""A tokenizer as a Hugging Face export carries it."""

from typing import Any, Protocol

from megatron_glm.checkpoint.hugging_face_writer import ExportedTokenizer


class Codec(Protocol):
    """What is needed of `megatron_glm.data.codecs.Codec`, which this package does not import."""

    tokenizer_type: str
    text_scheme: str | None
    specials: dict[str, int]


def export_tokenizer(codec: Codec) -> ExportedTokenizer:
    """The file content and options with which `MegatronGLMTokenizer` gives the codec's ids."""
    if codec.tokenizer_type == "HuggingFaceTokenizer":
        model, kind, options = _tokenizers_model(codec), "tokenizers", {}
    else:
        is_ice = codec.tokenizer_type == "IceTokenizer"
        model, kind = _sentencepiece_model(codec), "sentencepiece"
        options = {
            "offset": _offset(codec) if is_ice else 0,
            "whitespace": codec.text_scheme == "whitespace",
            "newlines": is_ice,
        }
    return ExportedTokenizer(model, kind, dict(codec.specials), options)


def _tokenizers_model(codec: Any) -> bytes:
    return codec._tokenizer.to_str().encode()


def _sentencepiece_model(codec: Any) -> bytes:
    return codec._processor.serialized_model_proto()


def _offset(codec: Any) -> int:
    return min(codec.vocab.values())
