"""Beam search with the semantics of transformers' `generate(num_beams=...)`."""

from collections.abc import Sequence

import torch

from megatron_glm.inference.search import Filling, Search


class BeamSearch(Search):
    """Keeps the `num_beams` likeliest fillings, and among the finished ones those with the best
    score: the sum of log-probabilities over length ** length_penalty.

    It ends when as many have finished and the likeliest that goes on, scored as if it ended now,
    is no better than the worst of them; or where all have reached the greatest length.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self._rows = [Filling(self.prompt)]
        self._scores = [0.0]
        # Sorted, the best first.
        self._finished: list[tuple[float, Filling]] = []

    @property
    def rows(self) -> Sequence[Filling]:
        return [] if self.finish_reason else self._rows

    @property
    def best(self) -> Filling:
        return self._finished[0][1] if self._finished else self._rows[0]

    @property
    def finished(self) -> list[tuple[float, Filling]]:
        """Score and filling of what has finished, the best first."""
        return self._finished

    def advance(self, logits: torch.Tensor) -> list[int]:
        num_beams = self.config.num_beams
        scores = logits.log_softmax(-1)
        for row, filling in zip(scores, self._rows, strict=True):
            filling.constrain(row, self.ends, self.config.no_repeat_ngram_size)
        scores += torch.tensor(self._scores, device=scores.device)[:, None]
        # Each of the two ends may take up to num_beams of the candidates.
        count = min(3 * num_beams, scores.numel())
        values, indices = scores.flatten().topk(count)
        parents, going_on = [], []
        for rank, (score, index) in enumerate(
            zip(values.tolist(), indices.tolist(), strict=True)
        ):
            parent, token = divmod(index, scores.shape[1])
            filling = self._rows[parent].append(token, self.ends)
            if self.end_of(filling) is None:
                going_on.append((score, filling))
                parents.append(parent)
            elif rank < num_beams:
                length = len(filling.generated)
                self._finished.append((score / length**self.config.length_penalty, filling))
        self._finished = sorted(self._finished, key=lambda pair: -pair[0])[:num_beams]
        if not going_on or not self._can_improve(going_on[0]):
            self.finish_reason = self.end_of(self.best)
            return []
        self._scores = [score for score, _ in going_on[:num_beams]]
        self._rows = [filling for _, filling in going_on[:num_beams]]
        return parents[:num_beams]

    def _can_improve(self, likeliest: tuple[float, Filling]) -> bool:
        if len(self._finished) < self.config.num_beams:
            return True
        score, filling = likeliest
        possible = score / len(filling.generated) ** self.config.length_penalty
        return possible > self._finished[-1][0]
