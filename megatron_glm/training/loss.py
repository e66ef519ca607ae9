"""The loss of a micro-batch and its parts by objective and by source."""

import math

import torch
from torch import Tensor

from megatron_glm.training.batch import Batch

# A part without a token in a step repeats its last value: the weight with which that is mixed in,
# in tokens. Beside a single real token it changes the value by less than fp32 resolves.
_REMEMBERED_WEIGHT = 1e-9


class LossParts:
    """Names and remembers the parts of the loss that a run reports.

    Megatron divides a sum by a count for every name, in every step and on every rank alike; a
    step without a single token of some objective would put NaN into its log line. So each part
    carries its last value along with a vanishing weight; before the first, that of a uniform
    guess, ln(vocabulary). Evaluation carries nothing; evaluation.py leaves out what had no data.
    """

    def __init__(
        self,
        objectives: dict[int, str],
        train_sources: dict[int, str],
        eval_sources: dict[int, str],
        vocab_size: int,
    ):
        """objectives, sources: id in the batch -> name in the log. One source alone is left out."""
        self._groups = {
            training: (objectives, sources if len(sources) > 1 else {})
            for training, sources in ((True, train_sources), (False, eval_sources))
        }
        self._guess = math.log(vocab_size)
        self._ids: dict[bool, tuple[Tensor, Tensor]] = {}
        self._last: Tensor | None = None

    def __call__(self, losses: Tensor, batch: Batch, training: bool) -> dict[str, Tensor]:
        """losses: [b, s] fp32, per token. Returns name -> [sum, number of tokens].

        Takes some 30 operations whatever the number of parts, and but for the first call no sync.
        """
        values = torch.stack((losses * batch.loss_mask, batch.loss_mask)).flatten(1)
        # [parts, 2]: a token counts for its objective and for its source.
        parts = (self._members(batch, training)[:, None] * values).sum(dim=2)
        if training:
            parts = self._remember(parts)
        objectives, sources = self._groups[training]
        names = [f"lm loss {name}" for name in (*objectives.values(), *sources.values())]
        return {"lm loss": values.sum(dim=1)} | dict(zip(names, parts.unbind(), strict=True))

    def _members(self, batch: Batch, training: bool) -> Tensor:
        """Which tokens, [parts, b * s], each part is made of."""
        device = batch.objectives.device
        if training not in self._ids:
            self._ids[training] = tuple(
                torch.tensor(list(names), dtype=torch.int64, device=device)
                for names in self._groups[training]
            )
        of_token = (batch.per_token(ids).flatten() for ids in (batch.objectives, batch.sources))
        pairs = zip(self._ids[training], of_token, strict=True)
        return torch.cat([ids[:, None] == tokens for ids, tokens in pairs])

    def _remember(self, parts: Tensor) -> Tensor:
        total, count = parts.unbind(dim=1)
        last = torch.full_like(total, self._guess) if self._last is None else self._last
        self._last = torch.where(count > 0, total / count.clamp(min=1), last)
        return parts + _REMEMBERED_WEIGHT * torch.stack((last, torch.ones_like(last)), dim=1)


def token_loss(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss over the targets and their number (int32), as Megatron's schedules take them.

    Megatron sums both over micro-batches and ranks and divides at the end
    (--calculate-per-token-loss), so that every target weighs the same whatever its micro-batch.
    """
    return (losses * batch.loss_mask).sum(), batch.loss_mask.sum().int()
