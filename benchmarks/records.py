"""Records of benchmarks: what was measured, when, on what, with which versions and source.

A record is one JSON file under `benchmarks/results/`, so that a number can be traced to the
source and the machine that gave it and be measured again.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

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
    """Commit of the source, with "+changes" if tracked files differ from it; "unknown" outside."""
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "-uno") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_record(
    benchmark: str,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    folder: Path = RESULTS,
) -> Path:
    """Write what a benchmark measured and return the file, `<benchmark>-<UTC time>.json`.

    Args:
        benchmark: its name, that of its file in `benchmarks/`.
        settings: what the whole run had in common, such as flags.
        rows: one mapping of plain values for each line of the table; units in the keys.
        folder: where the record goes.
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{benchmark}-{now:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as a table in Markdown; floats with four digits."""
    if not rows:
        return
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")


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
