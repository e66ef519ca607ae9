"""What every kind of tokenizer offers, and the special tokens of GLM."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_glm.data.indexed import token_dtype

SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<pad>")


class Codec(ABC):
    """A tokenizer file, and the ids that GLM's special tokens have with it.

    `specials` maps at least `SPECIAL_TOKENS` to ids; `vocab_size` is one more than the largest id.
    Text never yields the id of a special token, however it is spelled, except in `encode_prompt`.
    """

    tokenizer_type: ClassVar[str]
    text_scheme: str | None = None
    path: Path
    specials: dict[str, int]
    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text. UnicodeError where it holds lone surrogates."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts at once, each an array [tokens] of `dtype`, equal to `encode`'s."""

    @abstractmethod
    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of ids among which there is no special token."""

    @abstractmethod
    def serialize(self) -> bytes:
        """A file of the library behind it, a tokenizer.json or a SentencePiece model, that holds
        the special tokens too."""

    @property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Every token with its id."""

    @property
    def dtype(self) -> type[np.integer]:
        """The smallest type that Megatron's indexed datasets offer for these ids."""
        return token_dtype(self.vocab_size)

    @cached_property
    def fingerprint(self) -> dict[str, str | int | None]:
        """What must be equal for ids to mean the same: kind, sha256 of the file, vocabulary size,
        text scheme. JSON-serialisable."""
        return {
            "type": self.tokenizer_type,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "vocab_size": self.vocab_size,
            "text_scheme": self.text_scheme,
        }

    @cached_property
    def _special_names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self.specials.items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are spelled out; the text between two of them is
        encoded by itself, as GLM-130B's generation does."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            ids += [self.specials[part]] if part in self.specials else self.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_specials: bool = False) -> str:
        """Text of ids, special tokens spelled out or left out."""
        parts: list[str] = []
        run: list[int] = []
        for token_id in map(int, ids):
            if token_id not in self._special_names:
                run.append(token_id)
                continue
            parts.append(self.decode_text(run))
            run = []
            if not skip_specials:
                parts.append(self._special_names[token_id])
        parts.append(self.decode_text(run))
        return "".join(parts)
