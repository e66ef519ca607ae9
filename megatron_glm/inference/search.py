"""How the blanks of one prompt are filled, a step at a time: greedily, by sampling or by beams.

A search owns some rows of a batch. Each step it says what its rows read next, is given the logits,
and answers which of its rows go on.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from megatron_glm.errors import GLMError
from megatron_glm.inference.blanks import Prompt
from megatron_glm.inference.sampling import repeated_ngram_ends, sample


class Ends(NamedTuple):
    """Ids that begin and end what fills a blank."""

    sop: int
    eop: int
    eod: int


@dataclass(frozen=True)
class SearchConfig:
    """How to fill blanks.

    max_new_tokens: at most, over all blanks of a prompt, the `sop` between two blanks included.
    num_beams: 1 for greedy or sampled tokens. length_penalty: exponent of the length by which the
    score of a finished beam is divided; above 0 favours longer ones. temperature: 0 for the
    likeliest token each time. top_k: likeliest tokens to draw from, 0 for all. top_p: probability
    mass to draw from. no_repeat_ngram_size: no n-gram of so many tokens appears twice, the prompt
    included; 0 allows all. seed: of the draws.

    Raises GLMError, which names these fields: a program's user gives them as flags, a server's in
    JSON.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int = 1234

    def __post_init__(self):
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "in (0, 1]"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "length_penalty": (abs(self.length_penalty) < float("inf"), "a finite number"),
            "seed": (0 <= self.seed < 2**63, "in [0, 2^63)"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise GLMError(f"{name} {getattr(self, name)}: must be {rule}")
        if self.num_beams > 1 and self.temperature:
            raise GLMError(
                f"num_beams {self.num_beams}: beams are not sampled; drop temperature "
                f"{self.temperature}"
            )
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if self.temperature == 0.0 and getattr(self, name) != off:
                raise GLMError(
                    f"{name} {getattr(self, name)}: has no effect at temperature 0, where the "
                    "likeliest token is taken; give a temperature, for example 1"
                )


@dataclass(frozen=True)
class Filling:
    """What one row has generated: ids behind the first `sop`, which of the prompt's blanks it is
    in, and how many tokens behind that blank's `sop`."""

    prompt: Prompt
    generated: tuple[int, ...] = ()
    blank: int = 0
    offset: int = 0

    @property
    def position(self) -> int:
        """Position id of the last token."""
        blank = self.prompt.blanks[self.blank]
        return blank.first_position + blank.step * self.offset

    @property
    def has_next_blank(self) -> bool:
        """True where the end of this blank is the beginning of another."""
        return self.blank + 1 < len(self.prompt.blanks)

    def append(self, token: int, ends: Ends) -> "Filling":
        """With one more token; `sop` opens the next blank."""
        generated = (*self.generated, token)
        if token == ends.sop:
            return replace(self, generated=generated, blank=self.blank + 1, offset=0)
        return replace(self, generated=generated, offset=self.offset + 1)

    def constrain(self, scores: torch.Tensor, ends: Ends, no_repeat_ngram_size: int) -> None:
        """Rules tokens out of scores [v], in place: repeated n-grams, `sop` where there is no other
        blank; where there is one, `sop` takes the place of `eop`."""
        if no_repeat_ngram_size:
            tokens = (*self.prompt.context, ends.sop, *self.generated)
            scores[repeated_ngram_ends(tokens, no_repeat_ngram_size)] = -torch.inf
        if self.has_next_blank:
            scores[ends.sop] = scores[ends.eop]
            scores[ends.eop] = -torch.inf
        else:
            scores[ends.sop] = -torch.inf


class Search(ABC):
    """Fills the blanks of one prompt.

    finish_reason: None while it goes on, "stop" where the model ended, "length" where it was cut.
    """

    def __init__(self, prompt: Prompt, config: SearchConfig, ends: Ends, seq_length: int):
        self.prompt, self.config, self.ends = prompt, config, ends
        room = seq_length - len(prompt.context)
        if room < 1:
            raise GLMError(
                f"the prompt has {len(prompt.context)} tokens; with what fills its blanks it must "
                f"fit into the {seq_length} that the model was trained on: shorten it"
            )
        self.max_new_tokens = min(config.max_new_tokens, room)
        self.finish_reason: str | None = None

    @property
    @abstractmethod
    def rows(self) -> Sequence[Filling]:
        """The fillings that go on, one a row."""

    @property
    @abstractmethod
    def best(self) -> Filling:
        """The filling to show."""

    @abstractmethod
    def advance(self, logits: torch.Tensor) -> list[int]:
        """Takes logits fp32 [rows, v]; returns which row each of the next rows goes on from, none
        when the search is over."""

    def inputs(self) -> list[tuple[int, int]]:
        """The token that each row reads next, and its position id."""
        return [
            (row.generated[-1] if row.generated else self.ends.sop, row.position)
            for row in self.rows
        ]

    def end_of(self, filling: Filling) -> str | None:
        """Why a filling ends with its last token, None where it goes on."""
        if filling.generated[-1] in (self.ends.eop, self.ends.eod):
            return "stop"
        return "length" if len(filling.generated) >= self.max_new_tokens else None


class Sampler(Search):
    """One row; the likeliest token at temperature 0, a drawn one above. The draws of a search
    depend on its seed alone, whatever else is in the batch."""

    def __init__(self, *args, device: torch.device | str = "cpu"):
        super().__init__(*args)
        self._filling = Filling(self.prompt)
        self._generator = torch.Generator(device).manual_seed(self.config.seed)

    @property
    def rows(self) -> Sequence[Filling]:
        return [] if self.finish_reason else [self._filling]

    @property
    def best(self) -> Filling:
        return self._filling

    def advance(self, logits: torch.Tensor) -> list[int]:
        config = self.config
        scores = logits[0].clone()
        self._filling.constrain(scores, self.ends, config.no_repeat_ngram_size)
        token = sample(scores, config.temperature, config.top_k, config.top_p, self._generator)
        self._filling = self._filling.append(token, self.ends)
        self.finish_reason = self.end_of(self._filling)
        return [] if self.finish_reason else [0]
