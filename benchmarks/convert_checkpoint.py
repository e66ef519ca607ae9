"""Measures tools/convert_checkpoint.py beside plain copies of the same files.

    python benchmarks/convert_checkpoint.py [--layers 8 48] [--rounds 3] [--folder FOLDER]

GLMs of hidden size 4096 in fp16, generated as SAT checkpoints of 8 shards: 4.5 GB with 8 layers and
20.5 GB, 10B parameters, with 48 (and GLM-130B's vocabulary). Each round copies the files and brings
them to the disk as the tool does, and then makes each result from them; the medians count. Before
each run a source that fits into a third of the machine's memory is put into the page cache, and a
larger one out of it. Memory is the most that the process held. Required of the largest: half of the
copy's speed, in less than 3 GB. Needs twice the space of the largest checkpoint.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.records import Check, add_run_flags, run_benchmark  # noqa: E402
from megatron_glm.checkpoint.sat_writer import SATWriter  # noqa: E402
from megatron_glm.checkpoint.settings import Settings  # noqa: E402
from megatron_glm.checkpoint.table import Dimensions, Tensor  # noqa: E402
from megatron_glm.checkpoint.torch_file import BLOCK_BYTES  # noqa: E402

TOOL = ROOT / "tools" / "convert_checkpoint.py"
TARGETS = {
    "SAT, 2 shards": ["--to", "sat", "--target-tp", "2"],
    "Hugging Face": ["--to", "hf"],
    "Hugging Face, INT4": ["--to", "hf", "--quantization-bit-width", "4"],
    "Megatron": ["--to", "megatron"],
}
REQUIRED_TARGETS = ["SAT, 2 shards", "Hugging Face"]
REQUIRED_SHARE_OF_COPY = 0.5
REQUIRED_MEMORY_GB = 3.0
# Copies a folder and brings it to the disk, in a process that starts as fast as cp.
COPY = """
import os, shutil, sys
shutil.copytree(*sys.argv[1:])
for folder, _, names in os.walk(sys.argv[2]):
    for name in names:
        descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
"""
# A virtual machine gives freed memory back to its host, and pays to have it again: whoever begins
# at once would be spared that.
PAUSE_SECONDS = 5.0


class RandomSource:
    """Weights cut from one block of random numbers, which costs little time to make."""

    def __init__(self, dimensions: Dimensions):
        self.settings = Settings(dimensions, "fp16", True)
        self._block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).half() / 50

    def read(self, tensor: Tensor) -> torch.Tensor:
        shape = tensor.shape(self.settings.dimensions)
        result = torch.empty(shape, dtype=torch.float16)
        flat = result.view(-1)
        for start in range(0, len(flat), len(self._block)):
            part = flat[start : start + len(self._block)]
            part.copy_(self._block[: len(part)])
        return result


def write_source(layers: int, folder: Path) -> int:
    """Makes a SAT checkpoint of 8 shards; its size in bytes."""
    source = RandomSource(Dimensions(layers, 4096, 10880, 64, 150528))
    writer = SATWriter(source.settings, 8, torch.float16, None)
    folder.mkdir()
    writer.write(folder, 49300, source.read)
    return writer.num_bytes


def files(folder: Path) -> Iterator[Path]:
    """Every file of a folder."""
    return (path for path in folder.rglob("*") if path.is_file())


def prepare(source: Path, cached: bool) -> None:
    """Puts the files into the page cache, or out of it, and lets the machine come to rest."""
    os.sync()
    for path in files(source):
        with open(path, "rb", buffering=0) as file:
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached and file.read(BLOCK_BYTES):
                pass
    time.sleep(PAUSE_SECONDS)


def measure(command: list[str]) -> dict[str, float]:
    """Time, processor time and memory of a process; the last two of the tool's own words."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = sum(
        getattr(after, name) - getattr(before, name) for name in ("ru_utime", "ru_stime")
    )
    announced = re.search(r"at most ([\d.]+) GB", result.stdout)
    held = re.findall(r"peak memory: ([\d.]+) GB", result.stdout)
    return {
        "seconds": seconds,
        "processor_seconds": processor,
        "memory_gb": float(held[-1]) if held else float("nan"),
        "announced_gb": float(announced[1]) if announced else float("nan"),
    }


def run_rounds(
    layers: int, folder: Path, targets: list[str], rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for the copies and for each target, of a checkpoint that is made in the folder."""
    source, result = folder / "sat", folder / "result"
    size = write_source(layers, source)
    cached = 3 * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    commands = {"copy": [sys.executable, "-c", COPY, str(source), str(result)]}
    for label in targets:
        commands[label] = [
            sys.executable, str(TOOL), "--from", "sat", *TARGETS[label], "--load", str(source),
            "--save", str(result),
        ]  # fmt: skip
    measured: dict[str, list[dict[str, float]]] = {label: [] for label in commands}
    for number in range(rounds):
        for label, command in commands.items():
            prepare(source, cached)
            measured[label].append(measure(command))
            seconds = measured[label][-1]["seconds"]
            print(f"{layers} layers, round {number + 1}, {label}: {seconds:.1f} s", flush=True)
            shutil.rmtree(result)
    copy_seconds = statistics.median(run["seconds"] for run in measured["copy"])
    for label, runs in measured.items():
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        yield {
            "checkpoint_gb": round(size / 1e9, 1),
            "page_cache": "full" if cached else "empty",
            "result": label,
            "seconds": median["seconds"],
            "gb_per_second": size / 1e9 / median["seconds"],
            "share_of_copy_speed": copy_seconds / median["seconds"],
            "processor_seconds_per_gb": median["processor_seconds"] / (size / 1e9),
            "memory_gb": max(run["memory_gb"] for run in runs),
            "announced_gb": max(run["announced_gb"] for run in runs),
            "rounds": [round(run["seconds"], 1) for run in runs],
        }


def judge(rows: list[dict[str, Any]]) -> list[Check]:
    """What the rows of the largest checkpoint have to show."""
    checks = []
    largest = max(row["checkpoint_gb"] for row in rows)
    for row in rows:
        if row["checkpoint_gb"] == largest and row["result"] in REQUIRED_TARGETS:
            what = f"{largest:g} GB to {row['result']}"
            checks += [
                Check(f"{what}: share of the copy's speed", row["share_of_copy_speed"],
                      REQUIRED_SHARE_OF_COPY),
                Check(f"{what}: GB of memory", row["memory_gb"], REQUIRED_MEMORY_GB, False),
            ]  # fmt: skip
    return checks


def measure_all(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of every checkpoint, the smallest first."""
    for layers in sorted(args.layers):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            yield from run_rounds(layers, Path(folder), args.targets, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 48])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=REQUIRED_TARGETS)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    add_run_flags(parser)
    args = parser.parse_args()
    run_benchmark("convert_checkpoint", args, measure_all(args), judge=judge)


if __name__ == "__main__":
    main()
