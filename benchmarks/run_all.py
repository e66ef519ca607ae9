"""Runs the benchmarks of a GPU in the order of their importance: `python -m benchmarks.run_all`.

Each has a limit and the whole run another (--minutes); what is stopped leaves the rows that it has.
--only continues with what was not reached. Ends with every required figure and what became of it.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import RESULTS, ROOT


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
    "step-fp16": Run(("train_step", "--preset", "fp16"), 3, knows_minutes=True),
    "fused": Run(("fused",), 2),
    "update": Run(("update",), 2),
    "step-scaling": Run(("train_step", "--preset", "scaling", "--plot"), 6, knows_minutes=True),
    "decode": Run(("decode", "--plot"), 3),
    "start-up": Run(("start_up",), 2),
    "half-precision": Run(("half_precision",), 5),
}
# Below this nothing is begun.
LEAST_MINUTES = 0.5


class Ending(NamedTuple):
    """How a benchmark ended: minutes, status in words, and its PASS and FAIL lines."""

    minutes: float
    status: str
    checks: list[str]


def execute(run: Run, minutes: float, results: Path) -> Ending:
    """Runs a benchmark for so many minutes at most, its output passed on as it comes."""
    module, *flags = run.words
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags, "--results", str(results)]
    if run.knows_minutes:
        # Less what it takes to end.
        command += ["--minutes", f"{max(minutes - 0.25, 0.1):.2f}"]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    # With the processes that it has started.
    timer = threading.Timer(60 * minutes, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    checks = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith(("PASS ", "FAIL ")):
                checks.append(line.strip())
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    status = {0: "done", -signal.SIGKILL: "stopped at its limit"}.get(code, f"ended with {code}")
    return Ending((time.monotonic() - begin) / 60, status, checks)


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
    missed = []
    for name in arguments.only:
        left = (deadline - time.monotonic()) / 60
        if left < LEAST_MINUTES:
            missed.append(name)
            continue
        print(f"== {name}", flush=True)
        limit = min(RUNS[name].minutes, left)
        endings[name] = execute(RUNS[name], limit, arguments.results.resolve())
    print("\n== summary")
    for name, ending in endings.items():
        print(f"{name}: {ending.status} after {ending.minutes:.1f} min")
        for check in ending.checks:
            print(f"  {check}")
    if missed:
        print(f"not reached; go on with --only {' '.join(missed)}")
    if any(ending.status != "done" for ending in endings.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
