"""Byte-level BPE by remembered words: the ids of the Rust tokenizer, several times faster.

A byte-level BPE first cuts text into words by a regular expression and then merges within each
word. Most words of a corpus have been seen before, so a worker that remembers the ids of each word,
as the Rust tokenizer gave them, only has to find the words. That is exact if the words are: the
expression is translated to Python's `re` with explicit character classes, and before a character is
relied on, the Rust tokenizer's cuts around it are compared with ours. A text with a character that
differs (libraries know different versions of Unicode) is left to the Rust tokenizer.
"""

import json
import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import chain

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

# GPT-2's expression, which the ByteLevel pre-tokenizer has built in, then those of tiktoken's
# cl100k_base (Llama 3, GLM-4), of Qwen 2 and of o200k_base, as tokenizer.json files spell them.
# Each matches every character of a text, and once \p and \s are gone means the same to Python.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
KNOWN_WORDS = (
    GPT2_WORDS,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
CLASS = re.compile(r"\\p\{(?P<category>\w{1,2})\}|\\(?P<space>[sS])|(?P<bracket>\[\^?|\])")
# Unicode's White_Space; Python's \s holds some control characters besides.
ASCII_SPACE = "\\t-\\r "
WHITE_SPACE = ASCII_SPACE + "\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Words held per process, and characters in them: some 150 MB.
MAX_WORDS = 500_000
MAX_CHARACTERS = 10_000_000
# Where a character may change a cut: beside letters, digits, marks and white space.
PROBE = "a{0}A{0}E1{0}.{0}{0} {0}\n{0}"
# And, where it is an ASCII letter but for its case, in what follows an apostrophe.
CASE_PROBE = "'{0}'{0}e'r{0}'{0}l'l{0}'{0}v'v{0}s"


class WordEncoder:
    """Encodes texts with a `Tokenizer` whose words can be found in Python; see `build`."""

    def __init__(self, tokenizer: Tokenizer, words: str, dtype: type[np.integer]) -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        # For a few numbers, array is several times as fast as numpy.
        self._array_code = np.dtype(dtype).char
        self._find_ascii = _finder(words, 128)
        # Made when the first text needs it: all of Unicode takes a while.
        self._find = partial(_find_all, words)
        self._remembered: dict[str, bytes] = {}
        self._num_characters = 0
        self._known: set[str] = set()
        self._differing: set[str] = set()
        # The same merges on text that is one word whatever it holds.
        self._merge_only = Tokenizer.from_str(tokenizer.to_str())
        self._merge_only.pre_tokenizer = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False
        )
        self._merge_only.encode_special_tokens = True

    @staticmethod
    def build(tokenizer: Tokenizer, dtype: type[np.integer]) -> "WordEncoder | None":
        """An encoder that gives exactly the tokenizer's ids, or None where none can be made: with
        a normaliser, with added tokens that are not special, or with words other than those of
        `KNOWN_WORDS`."""
        words = _word_pattern(json.loads(tokenizer.to_str()))
        if words is None:
            return None
        encoder = WordEncoder(tokenizer, words, dtype)
        encoder._compare(map(chr, range(128)), encoder._find_ascii)
        return None if encoder._differing else encoder

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, an array [tokens]."""
        words = [self._words(text) for text in texts]
        others = [i for i, found in enumerate(words) if found is None]
        encoded = [self._join(found) if found is not None else b"" for found in words]
        unknown = [i for i, data in enumerate(encoded) if data is None]
        if unknown:
            self._learn(set(chain.from_iterable(words[i] for i in unknown)))
            for i in unknown:
                encoded[i] = self._join(words[i])
        arrays = [np.frombuffer(data, dtype=self._dtype) for data in encoded]
        if others:
            rust = self._tokenizer.encode_batch_fast(
                [texts[i] for i in others], add_special_tokens=False
            )
            for i, encoding in zip(others, rust, strict=True):
                arrays[i] = np.array(encoding.ids, dtype=self._dtype)
        if len(self._remembered) > MAX_WORDS or self._num_characters > MAX_CHARACTERS:
            self._remembered.clear()
            self._num_characters = 0
        return arrays

    def _words(self, text: str) -> list[str] | None:
        if text.isascii():
            return self._find_ascii(text)
        characters = set(text)
        if not characters <= self._known:
            self._compare(characters - self._known, self._find)
        return None if characters & self._differing else self._find(text)

    def _join(self, words: list[str]) -> bytes | None:
        try:
            return b"".join(map(self._remembered.__getitem__, words))
        except KeyError:
            return None

    def _learn(self, words: Iterable[str]) -> None:
        new = [word for word in words if word not in self._remembered]
        encodings = self._merge_only.encode_batch_fast(new, add_special_tokens=False)
        for word, encoding in zip(new, encodings, strict=True):
            self._remembered[word] = array(self._array_code, encoding.ids).tobytes()
        self._num_characters += sum(map(len, new))

    def _compare(self, characters: Iterable[str], find: Callable[[str], list[str]]) -> None:
        """Sorts characters into those at which the Rust tokenizer cuts as we do, and the others."""
        for character in characters:
            has_case = character.casefold().isascii()
            probe = (PROBE + CASE_PROBE * has_case).format(character)
            cuts = [span for _, span in self._tokenizer.pre_tokenizer.pre_tokenize_str(probe)]
            if [probe[start:end] for start, end in cuts] != find(probe):
                self._differing.add(character)
            self._known.add(character)


def _find_all(words: str, text: str) -> list[str]:
    return _finder(words, sys.maxunicode + 1)(text)


@cache
def _finder(words: str, end: int) -> Callable[[str], list[str]]:
    return re.compile(translate(words, end)).findall


def _word_pattern(config: dict) -> str | None:
    """The expression by which a tokenizer.json finds words, None where that is not all it does."""
    pre = config["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    is_plain = (
        config["normalizer"] is None
        and config["model"]["type"] == "BPE"
        and not config["model"].get("dropout")
        and all(token["special"] for token in config["added_tokens"])
    )
    if not is_plain or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1]["add_prefix_space"]:
        return None
    if len(steps) == 1 and steps[0]["use_regex"]:
        return GPT2_WORDS
    if len(steps) == 2 and steps[0].get("type") == "Split" and not steps[1]["use_regex"]:
        split = steps[0]
        words = split["pattern"].get("Regex")
        if words in KNOWN_WORDS and split["behavior"] == "Isolated" and not split["invert"]:
            return words
    return None


def translate(words: str, end: int) -> str:
    """One of `KNOWN_WORDS` for Python's `re`, with the same matches on text of code points below
    `end`: a smaller one makes shorter classes, which match faster."""
    in_class = False

    def replace(match: re.Match[str]) -> str:
        nonlocal in_class
        if match["bracket"]:
            in_class = match["bracket"] != "]"
            return match[0]
        if match["category"]:
            inside = _ranges(match["category"], end)
            return inside if in_class else f"[{inside}]"
        inside = ASCII_SPACE if end <= 128 else WHITE_SPACE
        return inside if in_class else f"[{'^' if match['space'] == 'S' else ''}{inside}]"

    return CLASS.sub(replace, words)


@cache
def _categories(end: int) -> np.ndarray:
    return np.array([unicodedata.category(chr(i)) for i in range(end)])


@cache
def _ranges(category: str, end: int) -> str:
    """The code points of a Unicode category (L, Lu ...) as the inside of a character class."""
    inside = np.char.startswith(_categories(end), category)
    edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return "".join(f"\\U{a:08x}-\\U{b - 1:08x}" for a, b in edges.reshape(-1, 2).tolist())
