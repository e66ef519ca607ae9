"""Losses read back as numbers: from Megatron's log lines, and of a baseline."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from megatron_glm.errors import GLMError

_TRAIN = re.compile(r"iteration\s+(\d+)/\s*(\d+) \|")
_VALID = re.compile(r"validation\S* loss at iteration (\d+)(?: on validation set)? \|")
_LOSS = "lm loss"


class LogLine(NamedTuple):
    """One report of a run.

    losses: nats per token by objective ("[MASK]", "[gMASK]" ...), "" for all together; means over
    the steps since the last report. The fields after it are None in a report on held-out data.
    """

    iteration: int
    is_valid: bool
    losses: dict[str, float]
    num_iterations: int | None = None
    iteration_ms: float | None = None
    batch_size: int | None = None  # sequences a step
    loss_scale: float | None = None
    grad_norm: float | None = None
    num_skipped: int | None = None  # steps since the last report whose gradients overflowed


def read_line(line: str) -> LogLine | None:
    """What a line of the log reports; None where it is no report of losses."""
    is_valid = (match := _VALID.search(line)) is not None
    if not is_valid and (match := _TRAIN.search(line)) is None:
        return None
    fields = _fields(line[match.end() :])
    losses = {}
    for name, value in fields.items():
        if name.startswith(_LOSS) and name.endswith(" value") == is_valid:
            losses[name.removeprefix(_LOSS).removesuffix(" value").strip()] = value
    if is_valid:
        return LogLine(int(match[1]), True, losses)
    batch_size = fields.get("global batch size")
    num_skipped = fields.get("number of skipped iterations")
    return LogLine(
        int(match[1]), False, losses, int(match[2]),
        fields.get("elapsed time per iteration (ms)"), batch_size and int(batch_size),
        fields.get("loss scale"), fields.get("grad norm"),
        None if num_skipped is None else int(num_skipped),
    )


def _fields(text: str) -> dict[str, float]:
    """The "name: number" fields of a line, between its bars."""
    fields = {}
    for field in text.split("|"):
        name, _, value = field.rpartition(":")
        try:
            fields[name.strip()] = float(value)
        except ValueError:
            continue
    return fields


def read_losses(lines: Iterable[str]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Training and held-out losses of a log, each {objective: {iteration: nats per token}}.

    Where a run went back to a checkpoint, what it did after it replaces what it had done before.
    """
    curves: tuple[dict, dict] = ({}, {})
    for line in lines:
        report = read_line(line)
        if report is None:
            continue
        if not report.is_valid:
            for curve in (*curves[0].values(), *curves[1].values()):
                for iteration in [i for i in curve if i > report.iteration]:
                    del curve[iteration]
        for name, loss in report.losses.items():
            curves[report.is_valid].setdefault(name, {})[report.iteration] = loss
    return curves


def read_baseline(path: Path) -> dict[str, float]:
    """{objective: nats per token} as tools/measure_unigram.py writes it; GLMError where it is
    something else."""
    try:
        losses = json.loads(path.read_text())
        if losses and all(isinstance(loss, int | float) for loss in losses.values()):
            return losses
        reason = "holds no losses"
    except (ValueError, AttributeError) as error:
        reason = f"cannot be read: {error}"
    raise GLMError(f"--baseline {path}: {reason}; give what tools/measure_unigram.py wrote")
