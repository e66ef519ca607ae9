"""Several training processes measured in alternating rounds."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training.turns import Failure, Task, Trainer

WARM_UP_STEPS = 2
# Seconds for building a model, for its first steps, which compile, or for a round.
LONGEST_WAIT = 240


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
            outcomes |= _measure_together({name: entries[name]}, plan, folder / f"{name}-alone")
    return outcomes


def _measure_together(
    entries: Mapping[str, Entry], plan: Plan, folder: Path
) -> dict[str, Outcome]:
    trainers = {
        name: Trainer(plan.context, entry.task, folder / name) for name, entry in entries.items()
    }
    outcomes = {
        name: Outcome({variant: [] for variant in entry.variants})
        for name, entry in entries.items()
    }

    def steps(name: str, *order: Any) -> dict[str, Any] | None:
        """A report, or None where the process fails or has failed."""
        if outcomes[name].error:
            return None
        seconds = min(LONGEST_WAIT, plan.deadline - time.monotonic())
        try:
            return trainers[name].steps(*order, seconds=seconds)
        except Failure as failure:
            outcomes[name].error = str(failure)
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
        for name, entry in entries.items():
            if entry.is_profiled and (report := steps(name, entry.variants[0], 1, True)):
                outcomes[name].components = report["components"]
    finally:
        for trainer in trainers.values():
            trainer.stop()
    return outcomes
