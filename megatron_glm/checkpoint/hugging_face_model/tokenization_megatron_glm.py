"""Tokenizer of an exported GLM: text with [MASK], [sMASK] or [gMASK] to a prompt, and back.

`tokenizer(text)` appends [gMASK] where the text holds no mask, and `sop`, after which the model
fills the blanks; `fill_blanks` puts what it wrote in their place.
"""

import re
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

MASKS = ("[MASK]", "[sMASK]", "[gMASK]")
NEWLINE, TAB = "<n>", "<|tab|>"
BLANKS = {" " * n: f"<|blank_{n}|>" for n in range(80, 1, -1)}


class SentencePieceText:
    """Text through a SentencePiece model whose pieces start at id `offset`.

    whitespace: newlines, tabs and runs of spaces are tokens of their own; newlines: a newline is
    (written as) the piece <n>.
    """

    def __init__(self, path: str, offset: int, whitespace: bool, newlines: bool):
        import sentencepiece

        self.model = sentencepiece.SentencePieceProcessor(model_file=path)
        self.offset, self.whitespace, self.newlines = offset, whitespace, newlines
        # Behind a newline piece the model neither adds a space nor drops one.
        self.guard = self.model.encode(NEWLINE) if whitespace else []

    def encode(self, text: str) -> list[int]:
        if self.whitespace:
            text = text.replace("\n", NEWLINE).replace("\t", TAB)
            for run, piece in BLANKS.items():
                text = text.replace(run, piece)
            text = NEWLINE + text
        return [i + self.offset for i in self.model.encode(text)[len(self.guard) :]]

    def decode(self, ids: list[int]) -> str:
        parts = []
        for is_text, run in groupby(ids, lambda i: i >= self.offset):
            if is_text:
                parts.append(self._decode([i - self.offset for i in run]))
            else:
                parts += [f"<image_{i}>" for i in run]
        return "".join(parts)

    def _decode(self, pieces: list[int]) -> str:
        text = self.model.decode(self.guard + pieces)
        if self.guard:
            text = text.removeprefix(NEWLINE)
        if self.newlines:
            text = text.replace(NEWLINE, "\n")
        if self.whitespace:
            text = text.replace(TAB, "\t")
            for run, piece in BLANKS.items():
                text = text.replace(piece, run)
        return text

    def vocab(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i + self.offset for i in range(len(self.model))}


class TokenizersText:
    """Text through a tokenizer.json."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer

        self.model = Tokenizer.from_file(path)
        self.model.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False) if ids else ""

    def vocab(self) -> dict[str, int]:
        return self.model.get_vocab(with_added_tokens=True)


class MegatronGLMTokenizer(PreTrainedTokenizer):
    """See the module. kind: "sentencepiece" or "tokenizers"; options: of its class above;
    special_ids: id of every special token."""

    # transformers takes names like "tokenizer.model" for files of other kinds.
    vocab_files_names = {"vocab_file": "glm_text.model"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str,
        kind: str,
        special_ids: dict[str, int],
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.vocab_file = vocab_file
        backend = {"sentencepiece": SentencePieceText, "tokenizers": TokenizersText}[kind]
        self.text = backend(vocab_file, **(options or {}))
        self.special_ids = special_ids
        self._names = {i: name for name, i in special_ids.items()}
        self._vocab = self.text.vocab() | special_ids
        self._tokens = {i: token for token, i in self._vocab.items()}
        self._special_pattern = re.compile(f"({'|'.join(map(re.escape, special_ids))})")
        kwargs |= {"pad_token": "<pad>", "eos_token": "<eop>", "mask_token": "[MASK]"}
        kwargs["extra_special_tokens"] = [
            name for name in special_ids if name not in ("<pad>", "<eop>", "[MASK]")
        ]
        kwargs.setdefault("padding_side", "left")
        super().__init__(kind=kind, special_ids=special_ids, options=options or {}, **kwargs)

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        result: list[str] = []
        parts = self._special_pattern.split(text)
        for part, behind in zip(parts, [*parts[1:], ""], strict=True):
            if part in self.special_ids:
                result.append(part)
            else:
                # What fills a blank begins with its own space.
                result += self._tokenize(part.removesuffix(" ") if behind in MASKS else part)
        return result

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._tokens[i] for i in self.text.encode(text)]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._tokens.get(int(index), f"<unused_{index}>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode([self._vocab[token] for token in tokens if token in self._vocab])

    def _decode(
        self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        parts = []
        for special, run in groupby(ids, lambda i: i in self._names):
            if not special:
                parts.append(self.text.decode([i for i in run if i in self._tokens]))
            elif not skip_special_tokens:
                parts += [self._names[i] for i in run]
        return "".join(parts)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        ids = [*token_ids_0, *(token_ids_1 or [])]
        if self.special_ids["<sop>"] in ids:
            return ids
        if not any(self.special_ids[name] in ids for name in MASKS):
            ids.append(self.special_ids["[gMASK]"])
        return [*ids, self.special_ids["<sop>"]]

    def fill_blanks(self, ids: Iterable[int]) -> str:
        """Text of a whole sequence (context, `sop`, filling, `sop`, filling ...) with each filling
        in the place of its mask; a mask without one stays."""
        sop, ends = self.special_ids["<sop>"], {self.special_ids["<eop>"], self.pad_token_id}
        context, *fillings = _split(map(int, ids), sop)
        masks = {self.special_ids[name] for name in MASKS}
        result: list[int] = []
        for token in context:
            if token in masks and fillings:
                result += [i for i in fillings.pop(0) if i not in ends]
            elif token != self.pad_token_id:
                result.append(token)
        return self._decode(result)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (prefix + self.vocab_files_names["vocab_file"])
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


def _split(ids: Iterable[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
