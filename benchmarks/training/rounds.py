"""Several training processes measured in alternating rounds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training.turns import Failure, Task, Trainer

WARM_UP_STEPS = 2
# Seconds for building a model, for its first steps, which compile, or for a round.
LONGEST_WAIT = 240
TOO_LATE = "not reached in the given minutes"


class Entry(NamedTuple):
    """A process and what its steps can be; the first variant is profiled where it is asked for."""

    task: Task
    variants: tuple[str, ...]
    is_profiled: bool = False


@dataclass
class Outcome:
    """What a process measured, by variant, and why it ended early if it did."""

    reports: dict[str, list[dict[str, Any]]]
    components: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    is_alone: bool = False
    """Whether it had no room beside the others of its group and took no turns with them."""


class Plan(NamedTuple):
    """How much is measured."""

    context: BaseContext
    """Of the processes: spawn, on a GPU."""
    num_rounds: int
    num_steps: int
    """Steps of a round."""
    deadline: float
    """In time.monotonic(); nothing begins after it and what is late is ended."""


def measure(entries: Mapping[str, Entry], plan: Plan, folder: Path) -> dict[str, Outcome]:
    """Builds all models at once and has them take turns.

    One that has no room beside the others is measured by itself when they have ended.
    """
    outcomes = _measure_together(entries, plan, folder / "together")
    for name, outcome in outcomes.items():
        if len(entries) > 1 and outcome.error and "OutOfMemory" in outcome.error:
            alone = _measure_together({name: entries[name]}, plan, folder / f"{name}-alone")
            outcomes[name] = replace(alone[name], is_alone=True)
    return outcomes


def _measure_together(
    entries: Mapping[str, Entry], plan: Plan, folder: Path
) -> dict[str, Outcome]:
    outcomes = {
        name: Outcome({variant: [] for variant in entry.variants})
        for name, entry in entries.items()
    }
    if time.monotonic() >= plan.deadline:
        for outcome in outcomes.values():
            outcome.error = TOO_LATE
        return outcomes
    print(f"starting {', '.join(entries)}", flush=True)
    trainers = {
        name: Trainer(plan.context, entry.task, folder / name) for name, entry in entries.items()
    }

    def steps(name: str, *order: Any) -> dict[str, Any] | None:
        """A report, or None where the process fails or has failed."""
        if outcomes[name].error:
            return None
        left = plan.deadline - time.monotonic()
        try:
            return trainers[name].steps(*order, seconds=min(LONGEST_WAIT, left))
        except Failure as failure:
            is_late = time.monotonic() >= plan.deadline
            outcomes[name].error = TOO_LATE if is_late else str(failure)
            trainers[name].stop()
            print(f"{name}: {failure}; the end of its log:\n{trainers[name].log()}", flush=True)
            return None

    turns = [(name, variant) for name, entry in entries.items() for variant in entry.variants]
    try:
        for name in entries:
            steps(name)
        for name, variant in turns:
            steps(name, variant, WARM_UP_STEPS)
        for _ in range(plan.num_rounds):
            for name, variant in turns:
                if report := steps(name, variant, plan.num_steps):
                    outcomes[name].reports[variant].append(report)
                    # Rows come when all have ended: whoever is killed before has told these.
                    print(f"{variant}: {report['seconds'] * 1e3:.4g} ms a step", flush=True)
        for name, entry in entries.items():
            if entry.is_profiled and (report := steps(name, entry.variants[0], 1, True)):
                outcomes[name].components = report["components"]
    finally:
        for trainer in trainers.values():
            trainer.stop()
    return outcomes
