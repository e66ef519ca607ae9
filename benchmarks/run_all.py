"""Runs the benchmarks of a GPU in the order of their importance: `python -m benchmarks.run_all`.

Each has a limit and the whole run another (--minutes): what no longer fits is left out for what
does, and named at the end; --only goes on with it, and its last name has all minutes that are left.
What is stopped leaves the rows that it has. Ends with every required figure that was reached and
what became of it.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import RESULTS, ROOT, Check
from benchmarks.training.rounds import TOO_LATE


class Run(NamedTuple):
    """One benchmark: its module and flags, and minutes that it may take."""

    words: tuple[str, ...]
    minutes: float
    knows_minutes: bool = False
    """Whether it ends by itself in time, given --minutes."""


RUNS = {
    "step-4096": Run(("train_step", "--preset", "4096", "--plot"), 5.5, knows_minutes=True),
    "attention": Run(("attention", "--plot"), 2.5),
    "step-12288": Run(("train_step", "--preset", "12288", "--plot"), 4, knows_minutes=True),
    "one-rank": Run(("one_rank_130b", "--plot"), 5, knows_minutes=True),
    "memory": Run(("train_step", "--preset", "memory", "--rounds", "1"), 2, knows_minutes=True),
    "step-fp16": Run(("train_step", "--preset", "fp16"), 3, knows_minutes=True),
    "half-precision": Run(("half_precision",), 4),
    "step-scaling": Run(
        ("train_step", "--preset", "scaling", "--rounds", "2", "--plot"), 6, knows_minutes=True
    ),
    "decode": Run(("decode", "--plot"), 3),
    "fused": Run(("fused",), 2),
    "update": Run(("update",), 2),
    "start-up": Run(("start_up", "--starts", "2"), 2),
}


class Ending(NamedTuple):
    """How a benchmark ended: minutes, status in words, and the figures that its record checks."""

    minutes: float
    status: str
    checks: list[Check]


def execute(run: Run, minutes: float, results: Path) -> Ending:
    """Runs a benchmark for so many minutes at most."""
    module, *flags = run.words
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags, "--results", str(results)]
    if run.knows_minutes:
        # Less what it takes to end.
        command += ["--minutes", f"{max(minutes - 0.25, 0.1):.2f}"]
    before = set(results.glob("*.json"))
    begin = time.monotonic()
    with started(command) as process:
        try:
            code = process.wait(60 * minutes)
            status = "done" if code == 0 else f"ended with {code}"
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
    minutes = (time.monotonic() - begin) / 60
    figures = [check for path in set(results.glob("*.json")) - before for check in checks(path)]
    if any(TOO_LATE in check.why for check in figures):
        status = "out of minutes"
    return Ending(minutes, status, figures)


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process that ends with the block, and with this process, even where that is killed.

    So do the processes that it has started, which would keep the memory of the GPU.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, process_group=0
    )
    # Its pipe from here is closed on leaving, or by the kernel.
    guard = subprocess.Popen(
        ["sh", "-c", f"read _; kill -s KILL -- -{process.pid}"],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        guard.communicate()
        process.wait()


def checks(record: Path) -> list[Check]:
    """The figures of a record."""
    found = json.loads(record.read_text()).get("checks", [])
    return [Check(*(each[field] for field in Check._fields)) for each in found]


def main(argv: list[str] | None = None) -> None:
    """Run all, or those of --only, and print what was required."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    endings: dict[str, Ending] = {}
    waiting = list(dict.fromkeys(arguments.only))
    try:
        for name in tuple(waiting):
            left = (deadline - time.monotonic()) / 60
            # The first is begun whatever time it has: whoever asks for it wants what it gives.
            if endings and left < RUNS[name].minutes:
                continue
            limit = left if waiting == [name] else min(left, RUNS[name].minutes)
            print(f"== {name}, up to {limit:.3g} of {left:.3g} minutes; should all end in the "
                  f"middle of it, go on with --only {' '.join(waiting)}", flush=True)
            endings[name] = execute(RUNS[name], limit, arguments.results.resolve())
            waiting.remove(name)
    finally:
        summarise(endings, waiting)
    if any(ending.status != "done" for ending in endings.values()):
        sys.exit(1)


def summarise(endings: dict[str, Ending], waiting: list[str]) -> None:
    """Print how each ended, and what is left."""
    print("\n== summary")
    for name, ending in endings.items():
        print(f"{name}: {ending.status} after {ending.minutes:.1f} min")
        for check in ending.checks:
            print(f"  {check}")
    if waiting:
        minutes = sum(RUNS[name].minutes for name in waiting)
        print(f"not done, {minutes:g} minutes at most: go on with --only {' '.join(waiting)}")
    sys.stdout.flush()


if __name__ == "__main__":
    # As Ctrl-C, so that the benchmark under way ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
