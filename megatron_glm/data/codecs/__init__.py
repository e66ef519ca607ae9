"""Text to token ids and back, behind one interface: no Megatron, no torch.

Preprocessing uses these directly, since importing torch in every worker would cost more time than
a small corpus takes; training sees them through `megatron_glm.data.tokenizer`.
"""

from pathlib import Path

from megatron_glm.data.codecs.base import Codec
from megatron_glm.data.codecs.hugging_face import HuggingFaceCodec
from megatron_glm.data.codecs.ice import TEXT_SCHEMES, IceCodec
from megatron_glm.data.codecs.sentence_piece import SentencePieceCodec
from megatron_glm.errors import GLMError

CODECS: dict[str, type[Codec]] = {
    "IceTokenizer": IceCodec,
    "SentencePieceTokenizer": SentencePieceCodec,
    "HuggingFaceTokenizer": HuggingFaceCodec,
}


def build_codec(
    tokenizer_type: str, tokenizer_model: str | Path, text_scheme: str | None = None
) -> Codec:
    """Reads a tokenizer file.

    tokenizer_type: a key of `CODECS`. tokenizer_model: the file. text_scheme: one of
    `TEXT_SCHEMES`, for IceTokenizer alone; None takes the one that GLM-130B was trained with.
    GLMError names the flag where the kind is unknown or the file missing or unreadable.
    """
    if tokenizer_type not in CODECS:
        raise GLMError(
            f"--tokenizer-type {tokenizer_type}: unknown; choose one of {', '.join(CODECS)}"
        )
    if text_scheme is not None and (
        tokenizer_type != "IceTokenizer" or text_scheme not in TEXT_SCHEMES
    ):
        raise GLMError(
            f"--text-scheme {text_scheme} with --tokenizer-type {tokenizer_type}: only "
            f"IceTokenizer has text schemes, and they are {', '.join(TEXT_SCHEMES)}"
        )
    if not tokenizer_model or not Path(tokenizer_model).is_file():
        raise GLMError(
            f"--tokenizer-model {tokenizer_model}: no such file; tools/train_tokenizer.py makes one"
        )
    options = {} if text_scheme is None else {"text_scheme": text_scheme}
    return CODECS[tokenizer_type](Path(tokenizer_model), **options)
