"""The tokenizer object that Megatron and the rest of this library are handed."""

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from megatron.core.tokenizers import MegatronTokenizerBase

from megatron_glm.data.codecs import CODECS, TEXT_SCHEMES, Codec, build_codec

TOKENIZER_TYPES = tuple(CODECS)
__all__ = ["TEXT_SCHEMES", "TOKENIZER_TYPES", "GLMTokenizer", "build_tokenizer"]


class GLMTokenizer(MegatronTokenizerBase):
    """A `Codec` as a tokenizer of Megatron; the special tokens of GLM are properties.

    Not as its MegatronTokenizerText, whose import brings transformers with it, for a second of
    every start.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__(str(codec.path), {"library": "glm"})
        self._tokenizer = codec

    def tokenize(self, text: str, parse_special: bool = False) -> list[int]:
        """Ids of a text. Where `parse_special`, "[MASK]" and the like in it become special tokens,
        as in a prompt; by default they are text, as in a corpus."""
        encode = self._tokenizer.encode_prompt if parse_special else self._tokenizer.encode
        return encode(text)

    def detokenize(self, ids: Iterable[int], skip_special_tokens: bool | None = None) -> str:
        """Text of ids; special tokens are spelled out unless they are to be skipped."""
        return self._tokenizer.decode(ids, skip_specials=bool(skip_special_tokens))

    def apply_chat_template(self) -> None:
        """GLM fills blanks and knows no chat."""
        raise NotImplementedError("a GLM has no chat template: use tokenize()")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self._tokenizer.vocab_size

    @property
    def vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return self._tokenizer.vocab

    @property
    def fingerprint(self) -> dict[str, str | int | None]:
        """Kind, sha256 of the file, vocabulary size and text scheme: what data and checkpoints
        store and training compares."""
        return self._tokenizer.fingerprint

    @property
    def unique_identifiers(self) -> OrderedDict:
        """The fingerprint, as part of the key of Megatron's index cache: independent of paths."""
        return OrderedDict(self.fingerprint)

    @property
    def inv_vocab(self) -> dict[int, str]:
        """Every id with its token."""
        return {token_id: token for token, token_id in self.vocab.items()}

    @property
    def mask(self) -> int:
        """Id of [MASK]: short blanks."""
        return self._tokenizer.specials["[MASK]"]

    @property
    def gmask(self) -> int:
        """Id of [gMASK]: one long blank at the end."""
        return self._tokenizer.specials["[gMASK]"]

    @property
    def smask(self) -> int:
        """Id of [sMASK]: blanks of whole sentences."""
        return self._tokenizer.specials["[sMASK]"]

    @property
    def eod(self) -> int:
        """Id of <eod>: end of a document."""
        return self._tokenizer.specials["<eod>"]

    @property
    def sop(self) -> int:
        """Id of <sop>: start of what fills a blank."""
        return self._tokenizer.specials["<sop>"]

    @property
    def eop(self) -> int:
        """Id of <eop>: end of what fills a blank."""
        return self._tokenizer.specials["<eop>"]

    @property
    def pad(self) -> int:
        """Id of <pad>."""
        return self._tokenizer.specials["<pad>"]


def build_tokenizer(
    tokenizer_type: str, tokenizer_model: str | Path, text_scheme: str | None = None
) -> GLMTokenizer:
    """The tokenizer of --tokenizer-type, --tokenizer-model and --text-scheme; see `build_codec`."""
    return GLMTokenizer(build_codec(tokenizer_type, tokenizer_model, text_scheme))
