"""How many samples and tokens of each source and objective a run has trained on."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES

COLUMNS = ("samples", "tokens", "targets")


class Ledger:
    """Counts what a data parallel rank reads; ranks are added up only when asked.

    Adding a micro-batch neither waits for the device nor communicates.
    """

    def __init__(self, source_names: list[str]) -> None:
        """source_names: by their number in a batch (`sources`)."""
        self.source_names = source_names
        self._earlier: dict[str, dict[str, list[int]]] = {}
        # One row more than there are counts: what is no sample goes there.
        self._counts = torch.zeros(
            len(source_names) * len(OBJECTIVE_NAMES) + 1, len(COLUMNS), dtype=torch.int64
        )

    def add(
        self, objectives: Tensor, sources: Tensor, sample_ends: Tensor, loss_mask: Tensor
    ) -> None:
        """Counts a micro-batch: [b, k] int64 three times, and [b, s] float32, as in a batch."""
        if self._counts.device != objectives.device:
            self._counts = self._counts.to(objectives.device)
        zero = torch.zeros_like(sample_ends[:, :1])
        targets = torch.cat((zero, loss_mask.long().cumsum(1)), dim=1).gather(1, sample_ends)
        rows = torch.where(
            objectives < 0, len(self._counts) - 1, sources * len(OBJECTIVE_NAMES) + objectives
        )
        values = (torch.ones_like(sample_ends), sample_ends.diff(dim=1, prepend=zero),
                  targets.diff(dim=1, prepend=zero))
        self._counts.index_add_(0, rows.flatten(), torch.stack(values, dim=-1).flatten(0, 1))

    def state_dict(self, group: ProcessGroup | None = None) -> dict[str, dict[str, list[int]]]:
        """Source -> objective -> [samples, tokens, targets] since the run began; zeros left out.

        group: the data parallel group, all of which must call; None where there is one rank.
        """
        counts = self._counts.clone()
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        result = {source: {name: list(row) for name, row in rows.items()}
                  for source, rows in self._earlier.items()}
        names = [(source, objective) for source in self.source_names
                 for objective in OBJECTIVE_NAMES.values()]
        for (source, objective), row in zip(names, counts[:-1].tolist(), strict=True):
            if any(row):
                earlier = result.setdefault(source, {}).get(objective, [0] * len(COLUMNS))
                result[source][objective] = [a + b for a, b in zip(earlier, row, strict=True)]
        return result

    def load_state_dict(self, state: dict[str, dict[str, list[int]]]) -> None:
        """Goes on from what `state_dict` gave. Sources that are no longer read are remembered."""
        self._earlier = state
        self._counts.zero_()


def ledger_lines(state: dict[str, dict[str, list[int]]]) -> list[str]:
    """One line for each source and objective, with its share of all tokens."""
    total = sum(row[1] for rows in state.values() for row in rows.values())
    return [
        f"{source} {objective}: {samples:,} samples, {tokens:,} tokens ({tokens / total:.2%}), "
        f"{targets:,} targets"
        for source, rows in sorted(state.items())
        for objective, (samples, tokens, targets) in sorted(rows.items())
    ]
