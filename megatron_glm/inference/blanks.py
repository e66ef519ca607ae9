"""Text with blanks to samples that a model can fill, and what it filled back to text.

A sample is a context with masks, then for each mask from left to right `sop` and the tokens that
fill it, each of which sees the whole context and all that was filled before it (GLM-130B paper,
arXiv 2210.02414, section 2.1). Training fills the blanks of a sample the same way, so several
blanks need a single pass.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Protocol

from megatron_glm.errors import GLMError


class Mask(Enum):
    """Kinds of blanks, as a text spells them."""

    MASK = "[MASK]"
    SENTENCE = "[sMASK]"
    GENERATION = "[gMASK]"


_PATTERN = re.compile("|".join(re.escape(mask.value) for mask in Mask))
# Context before a blank that its text is decoded behind: tokenizers put a space, or drop one, by
# what precedes, and no character spans more tokens than this.
_LEAD = 8


class Tokenizer(Protocol):
    """The part of GLMTokenizer that is used here."""

    vocab_size: int
    mask: int
    smask: int
    gmask: int
    sop: int
    eop: int
    eod: int

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: Sequence[int]) -> str: ...


class PromptError(GLMError):
    """A text whose blanks cannot be filled."""


@dataclass(frozen=True)
class Blank:
    """A blank of a context.

    index: place of its mask in the context. first_position: position id of its `sop`. step: 0
    where every token that fills it repeats that position, 1 where they count up from it.
    """

    mask: Mask
    index: int
    first_position: int
    step: int


@dataclass(frozen=True)
class Prompt:
    """A text with blanks.

    texts: what stands around the blanks, one more than there are blanks. context: ids, masks
    included; position i is token i's position id. blanks: in the order of the text.
    """

    texts: tuple[str, ...]
    context: tuple[int, ...]
    blanks: tuple[Blank, ...]


class BlankCodec:
    """Texts with blanks to prompts and back, with one tokenizer.

    unified_multitask_encoding: the position scheme of instructions that the model was trained with
    (see `encode`).
    """

    def __init__(self, tokenizer: Tokenizer, unified_multitask_encoding: bool = False):
        self.tokenizer = tokenizer
        self.unified_multitask_encoding = unified_multitask_encoding
        self._ids = {
            Mask.MASK: tokenizer.mask,
            Mask.SENTENCE: tokenizer.smask,
            Mask.GENERATION: tokenizer.gmask,
        }

    def encode(self, text: str, multitask: bool = False) -> Prompt:
        """The prompt of a text with any number of [MASK] and [sMASK], or with one [gMASK], which is
        added behind a text without a mask.

        A space before a mask is left to the blank, since spans begin with theirs. Everything else
        in the text, "<sop>" included, is text. multitask: the text is an instruction that ends in
        [MASK] (added if it is not there), answered as multitask samples are: positions count up,
        from [MASK]'s own under the unified scheme and from the one behind it otherwise.

        Raises PromptError.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt holds {text[error.start]!a} at character {error.start}, half of a "
                "surrogate pair or a byte that is not UTF-8: give text"
            ) from None
        masks = [Mask(found) for found in _PATTERN.findall(text)]
        texts = _PATTERN.split(text)
        if not masks:
            masks = [Mask.MASK if multitask else Mask.GENERATION]
            texts.append("")
        if Mask.GENERATION in masks and len(masks) > 1:
            raise PromptError(
                f"the prompt holds {' '.join(mask.value for mask in masks)}: a [gMASK] must be its "
                "only blank, since the model never saw it with another; use [MASK] for short ones"
            )
        if multitask and (masks != [Mask.MASK] or texts[-1].strip()):
            raise PromptError("an instruction has one blank, a [MASK] at its end")
        context: list[int] = []
        places = []
        for mask, before in zip(masks, texts, strict=False):
            context += self.tokenizer.tokenize(before.removesuffix(" "))
            places.append(len(context))
            context.append(self._ids[mask])
        if not multitask:
            context += self.tokenizer.tokenize(texts[-1])
        behind = len(context)
        if multitask:
            first = behind - 1 if self.unified_multitask_encoding else behind
            blanks = [Blank(Mask.MASK, places[0], first, 1)]
        else:
            blanks = [
                Blank(mask, place, behind, 1)
                if mask is Mask.GENERATION
                else Blank(mask, place, place, 0)
                for mask, place in zip(masks, places, strict=True)
            ]
        return Prompt(tuple(texts), tuple(context), tuple(blanks))

    def split(self, generated: Sequence[int]) -> list[list[int]]:
        """The ids that fill each blank that was begun: `generated` cut at `sop`, ends left out."""
        ends = (self.tokenizer.eop, self.tokenizer.eod)
        cuts = [i for i, token in enumerate(generated) if token == self.tokenizer.sop]
        return [
            [token for token in generated[start + 1 : stop] if token not in ends]
            for start, stop in pairwise([-1, *cuts, len(generated)])
        ]

    def fill(self, prompt: Prompt, generated: Sequence[int]) -> list[str]:
        """The text of each blank that was begun. generated: ids behind the first `sop`."""
        fills, start, ids = [], 0, []
        for blank, filling in zip(prompt.blanks, self.split(generated), strict=False):
            ids += prompt.context[start : blank.index]
            fills.append(self._decode(ids, filling))
            ids += filling
            start = blank.index + 1
        return fills

    def _decode(self, before: list[int], filling: list[int]) -> str:
        # Rows of the embedding beyond the vocabulary have no text.
        filling = [token for token in filling if token < self.tokenizer.vocab_size]
        lead = before[-_LEAD:]
        return self.tokenizer.detokenize(lead + filling)[len(self.tokenizer.detokenize(lead)) :]

    @staticmethod
    def join(prompt: Prompt, fills: Sequence[str], marks: tuple[str, str] = ("", "")) -> str:
        """The text with its blanks filled, each between `marks`; a mask without a fill stays."""
        parts = []
        for i, blank in enumerate(prompt.blanks):
            text = prompt.texts[i]
            if i >= len(fills):
                parts += [text, blank.mask.value]
                continue
            # The space that was left to the blank, or to which the blank has added one.
            fill = fills[i].removeprefix(" ") if text.endswith(" ") else fills[i]
            parts += [text, marks[0], fill, marks[1]]
        return "".join([*parts, prompt.texts[-1]])
