"""Records of benchmarks: what was measured, when, on what, with which versions and source.

A record is one JSON file under `benchmarks/results/`, so that a number can be traced to the
source and the machine that gave it and be measured again. `run_benchmark` is the frame of a
benchmark that yields its rows one by one: it prints and records each as it comes.
"""

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "triton", "transformers", "numpy", "nvidia-cudnn-cu13")


def hardware() -> dict[str, Any]:
    """CPU model, cores and threads of torch, memory in GiB and, where there are any, the GPUs."""
    described = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if torch.cuda.is_available():
        described["gpus"] = [
            torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
        ]
    return described


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and of those of PACKAGES that are installed."""
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> str:
    """Commit of the source, with "+changes" if tracked files differ from it.

    Where the source was copied without its history, what GIT_REVISION says, else "unknown".
    """
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_REVISION", "unknown")


class Check(NamedTuple):
    """A figure that is required of a benchmark."""

    what: str
    value: float | None
    """What was measured; None where that failed."""
    bound: float
    is_floor: bool = True
    """Whether the value must be at least the bound; else at most."""
    why: str = ""
    """Why there is no value."""

    @property
    def passed(self) -> bool | None:
        """None where there is no number to tell."""
        if self.value is None or math.isnan(self.value):
            return None
        return self.value >= self.bound if self.is_floor else self.value <= self.bound

    def __str__(self) -> str:
        required = f"{'>=' if self.is_floor else '<='} {self.bound:g} required"
        if self.passed is None:
            return f"NOT MEASURED {self.what}, {required}: {self.why or 'no number'}"
        result = "PASS" if self.passed else "FAIL"
        return f"{result} {self.what}: {_cell(self.value)} {required}"


def write_record(
    benchmark: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path = RESULTS,
    *,
    checks: Sequence[Check] = (),
    path: Path | None = None,
) -> Path:
    """Write what a benchmark measured and return the file, `<benchmark>-<UTC time>.json`.

    Args:
        benchmark: its name, that of its file in `benchmarks/`.
        settings: what the whole run had in common, such as flags.
        rows: one mapping of plain values for each line of the table; units in the keys. NaN and
            Inf, which JSON does not have, become null.
        folder: where the record goes.
        checks: what the rows were required to show.
        path: the record to bring up to date instead of a new one.
    """
    now = datetime.datetime.now(datetime.UTC)
    record = {
        "benchmark": benchmark,
        "date": now.isoformat(timespec="seconds"),
        "git_revision": git_revision(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": dict(settings),
        "rows": [dict(row) for row in rows],
    }
    if checks:
        record["checks"] = [check._asdict() | {"passed": check.passed} for check in checks]
    folder.mkdir(parents=True, exist_ok=True)
    path = path or folder / f"{benchmark}-{now:%Y%m%dT%H%M%SZ}.json"
    text = json.dumps(_finite(record), indent=1, default=str, allow_nan=False) + "\n"
    # Whoever is killed here leaves the whole record before this row or the whole with it.
    beside = path.with_suffix(".part")
    beside.write_text(text)
    beside.replace(path)
    return path


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `run_benchmark` reads."""
    parser.add_argument("--plot", action="store_true", help="draw a PNG beside the record")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")


def run_benchmark(
    benchmark: str,
    arguments: argparse.Namespace,
    rows: Iterable[dict[str, Any]],
    *,
    plot: Callable[[list[dict[str, Any]], Path], None] | None = None,
    judge: Callable[[list[dict[str, Any]]], list[Check]] = lambda rows: [],
) -> Path:
    """Print and record rows as they are measured, then the table, the checks and the plot.

    The record is brought up to date with every row: a run that is stopped leaves what it has.

    Args:
        benchmark: its name, that of its file in `benchmarks/`.
        arguments: parsed flags, those of `add_run_flags` among them; the others are its settings.
        rows: the measurements; one that failed has the reason under "error".
        plot: draws the rows that did not fail, where --plot was given.
        judge: what the rows were required to show.

    Returns:
        The record.
    """
    settings = {k: v for k, v in vars(arguments).items() if k not in ("results", "plot")}
    measured: list[dict[str, Any]] = []
    path = None
    for row in rows:
        measured.append(row)
        print("; ".join(f"{key} {_cell(value)}" for key, value in row.items()), flush=True)
        path = write_record(
            benchmark, settings, measured, arguments.results, checks=judge(measured), path=path
        )
    print_table(measured)
    for check in judge(measured):
        print(check)
    path = path or write_record(benchmark, settings, measured, arguments.results)
    print(f"record: {path.name}", flush=True)
    drawn = [row for row in measured if "error" not in row]
    if arguments.plot and plot and drawn:
        plot(drawn, path.with_suffix(".png"))
    return path


def reason(error: Exception) -> str:
    """An error as a row's "error": its class and the first line of its message; of a lack of
    memory up to the GPU's capacity, as torch goes on with advice."""
    line = str(error).partition("\n")[0].partition(" of which ")[0]
    return f"{type(error).__name__}: {line}"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table in Markdown; floats with four digits, blanks where a key is missing."""
    if not rows:
        return
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, *([_cell(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


def _finite(value: Any) -> Any:
    """A tree of values with None for each float that is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        return found.group(1)
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()
