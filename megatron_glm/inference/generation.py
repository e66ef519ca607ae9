"""Many prompts through one engine: rows join and leave the batch between steps."""

from collections import deque
from collections.abc import Iterator, Sequence

from megatron_glm.inference.beam_search import BeamSearch
from megatron_glm.inference.blanks import Prompt
from megatron_glm.inference.engine import Engine
from megatron_glm.inference.search import Ends, Sampler, Search, SearchConfig


def new_search(prompt: Prompt, config: SearchConfig, ends: Ends, engine: Engine) -> Search:
    """The search that a configuration asks for. GLMError where the prompt is too long."""
    seq_length = engine.settings.seq_length
    if config.num_beams > 1:
        return BeamSearch(prompt, config, ends, seq_length)
    return Sampler(prompt, config, ends, seq_length, device=engine.device)


class Batch:
    """The searches that share an engine's rows, which are those of each search in turn."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.searches: list[Search] = []

    def add(self, searches: Sequence[Search]) -> None:
        """Takes in new searches and reads their contexts."""
        if searches:
            self.engine.prefill([search.prompt.context for search in searches])
            self.searches += searches

    def remove(self, search: Search) -> None:
        """Drops a search that nobody waits for any more."""
        rows: list[int] = []
        first = 0
        for other in self.searches:
            if other is not search:
                rows += range(first, first + len(other.rows))
            first += len(other.rows)
        self.searches.remove(search)
        self.engine.cache.select(rows)

    def step(self) -> list[Search]:
        """One token for every row; returns the searches that are over, which leave the batch."""
        inputs = [step for search in self.searches for step in search.inputs()]
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


def run(
    engine: Engine, searches: Sequence[Search], max_batch_size: int
) -> Iterator[Search]:
    """Runs searches to their ends, yielding each when it is over.

    max_batch_size: rows at a time; a beam search takes `num_beams`, and runs alone where it takes
    more than there are.
    """
    batch, waiting = Batch(engine), deque(searches)
    taken = 0
    while waiting or batch.searches:
        joining = []
        while waiting and (
            not taken or taken + waiting[0].config.num_beams <= max_batch_size
        ):
            taken += waiting[0].config.num_beams
            joining.append(waiting.popleft())
        batch.add(joining)
        for search in batch.step():
            taken -= search.config.num_beams
            yield search
