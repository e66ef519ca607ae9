"""Any Hugging Face tokenizer.json, through the Rust `tokenizers` library."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer

from megatron_glm.data.codecs.base import SPECIAL_TOKENS, Codec
from megatron_glm.data.codecs.words import WordEncoder
from megatron_glm.errors import GLMError


class HuggingFaceCodec(Codec):
    """A tokenizer.json; the special tokens that it lacks get the ids behind its last one.

    Neither its post-processor (which would add [CLS] and the like) nor its truncation and padding
    are applied: a corpus keeps all of its text and nothing else.
    """

    tokenizer_type = "HuggingFaceTokenizer"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises a bare Exception.
            raise GLMError(
                f"--tokenizer-model {path}: not a tokenizer.json of Hugging Face ({error})"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
        )
        # Text that spells a special token is text.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._words:
            return self._words.encode_batch(texts)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    @cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.build(self._tokenizer, self.dtype)

    def decode_text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False) if ids else ""

    def serialize(self) -> bytes:
        return self._tokenizer.to_str().encode()

    @property
    def vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)
