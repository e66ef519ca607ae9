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
    guess, ln(vocabulary). Evaluation carries nothing: an objective without data reads nan.
    """

    def __init__(
        self,
        objectives: dict[int, str],
        train_sources: dict[int, str],
        eval_sources: dict[int, str],
        vocab_size: int,
    ):
        """objectives, sources: id in the batch -> name in the log. One source alone is left out."""
        self.objectives = objectives
        self.sources = {True: train_sources, False: eval_sources}
        names = (*objectives.values(), *train_sources.values())
        self._last = dict.fromkeys(names, math.log(vocab_size))

    def __call__(self, losses: Tensor, batch: Batch, training: bool) -> dict[str, Tensor]:
        """losses: [b, s] fp32, per token. Returns name -> [sum, number of tokens]; no sync."""
        report = {"lm loss": torch.stack(((losses * batch.loss_mask).sum(), batch.loss_mask.sum()))}
        groups = [(batch.objectives, self.objectives)]
        if len(self.sources[training]) > 1:
            groups.append((batch.sources, self.sources[training]))
        for ids, names in groups:
            of_token = batch.per_token(ids)
            for index, name in names.items():
                mask = batch.loss_mask * (of_token == index)
                part = torch.stack(((losses * mask).sum(), mask.sum()))
                report[f"lm loss {name}"] = self._remember(name, part) if training else part
        return report

    def _remember(self, name: str, part: Tensor) -> Tensor:
        last = torch.as_tensor(self._last[name], dtype=part.dtype, device=part.device)
        total, count = part.unbind()
        self._last[name] = torch.where(count > 0, total / count.clamp(min=1), last)
        return part + _REMEMBERED_WEIGHT * torch.stack((last, torch.ones_like(last)))


def token_loss(losses: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Summed loss over the targets and their number (int32), as Megatron's schedules take them.

    Megatron sums both over micro-batches and ranks and divides at the end
    (--calculate-per-token-loss), so that every target weighs the same whatever its micro-batch.
    """
    return (losses * batch.loss_mask).sum(), batch.loss_mask.sum().int()
