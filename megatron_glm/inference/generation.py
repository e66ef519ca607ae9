"""Many prompts through one engine: rows join and leave the batch between steps."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_glm.inference.beam_search import BeamSearch
from megatron_glm.inference.blanks import BlankCodec, Prompt
from megatron_glm.inference.engine import Engine
from megatron_glm.inference.search import Ends, Sampler, Search, SearchConfig


@dataclass(frozen=True)
class Completion:
    """What was made of a text.

    text: with its blanks filled; a blank that was not reached stays a mask. fills: text of each
    blank that was begun. finish_reason: "stop" where the model ended, "length" where it was cut.
    num_new_tokens: generated ones, `sop` and the ends included.
    """

    text: str
    fills: list[str]
    finish_reason: str
    num_context_tokens: int
    num_new_tokens: int


class Filler:
    """A model with the codec of its texts: makes searches of prompts, and texts of searches."""

    def __init__(self, engine: Engine, codec: BlankCodec):
        self.engine, self.codec = engine, codec
        tokenizer = codec.tokenizer
        self._ends = Ends(tokenizer.sop, tokenizer.eop, tokenizer.eod)

    def search(self, prompt: Prompt, config: SearchConfig) -> Search:
        """The search that a configuration asks for. GLMError where the prompt is too long."""
        seq_length = self.engine.settings.seq_length
        if config.num_beams > 1:
            return BeamSearch(prompt, config, self._ends, seq_length)
        return Sampler(prompt, config, self._ends, seq_length, device=self.engine.device)

    def completion(self, search: Search) -> Completion:
        """The result of a search that is over."""
        fills = self.codec.fill(search.prompt, search.best.generated)
        return Completion(
            text=self.codec.join(search.prompt, fills),
            fills=fills,
            finish_reason=search.finish_reason,
            num_context_tokens=len(search.prompt.context),
            num_new_tokens=len(search.best.generated),
        )


class Batch:
    """The searches that share an engine's rows, which are those of each search in turn."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.searches: list[Search] = []

    @property
    def num_rows(self) -> int:
        """Rows that are taken: a beam search may take `num_beams` at any step."""
        return sum(search.config.num_beams for search in self.searches)

    def add(self, searches: Sequence[Search]) -> None:
        """Takes in new searches and reads their contexts."""
        if searches:
            self.engine.prefill([search.prompt.context for search in searches])
            self.searches += searches

    def remove(self, searches: Sequence[Search]) -> None:
        """Drops searches that nobody waits for any more."""
        kept, rows, first = [], [], 0
        for search in self.searches:
            last = first + len(search.rows)
            if search not in searches:
                kept.append(search)
                rows += range(first, last)
            first = last
        self.searches = kept
        self.engine.cache.select(rows)

    def step(self) -> list[Search]:
        """One token for every row; returns the searches that are over, which leave the batch."""
        inputs = [read for search in self.searches for read in search.inputs()]
        tokens, position_ids = zip(*inputs, strict=True)
        logits = self.engine.decode(tokens, position_ids)
        rows: list[int] = []
        first = 0
        for search in self.searches:
            last = first + len(search.rows)
            rows += [first + parent for parent in search.advance(logits[first:last])]
            first = last
        over = [search for search in self.searches if search.finish_reason]
        self.searches = [search for search in self.searches if not search.finish_reason]
        self.engine.cache.select(rows)
        return over


def take_fitting(waiting: deque, num_rows: int, max_rows: int) -> list:
    """Takes from the front of `waiting` (whose items have a `config`) what fits beside `num_rows`
    taken ones; what needs more than `max_rows` runs alone."""
    taken = []
    while waiting and (not num_rows or num_rows + waiting[0].config.num_beams <= max_rows):
        taken.append(waiting.popleft())
        num_rows += taken[-1].config.num_beams
    return taken


def run(engine: Engine, searches: Sequence[Search], max_rows: int) -> Iterator[Search]:
    """Runs searches to their ends, yielding each when it is over.

    max_rows: rows at a time; a beam search takes `num_beams`.
    """
    batch, waiting = Batch(engine), deque(searches)
    while waiting or batch.searches:
        batch.add(take_fitting(waiting, batch.num_rows, max_rows))
        yield from batch.step()
