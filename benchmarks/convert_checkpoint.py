"""Measures tools/convert_checkpoint.py on a checkpoint that does not fit into its memory.

    python benchmarks/convert_checkpoint.py [--layers 48] [--folder FOLDER] [--keep]

A GLM of hidden size 4096 in fp16 (48 layers and GLM-130B's vocabulary: 10B parameters, 20 GB) is
generated as a SAT checkpoint of 8 shards. Each row then makes one result of it: a plain copy of the
files, brought to the disk as the tool does, SAT at 2 shards, Hugging Face, Megatron. Memory is the
most that the process held; the speed is bytes read by the clock, and again by the processor time
of the process, which depends less on what else the machine does. Needs three times the space of
the checkpoint.
"""

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.records import print_table, write_record  # noqa: E402
from megatron_glm.checkpoint.sat_writer import SATWriter  # noqa: E402
from megatron_glm.checkpoint.settings import Settings  # noqa: E402
from megatron_glm.checkpoint.table import Dimensions, Tensor  # noqa: E402

TOOL = ROOT / "tools" / "convert_checkpoint.py"
TARGETS = {
    "SAT, 2 shards": ["--to", "sat", "--target-tp", "2"],
    "Hugging Face": ["--to", "hf"],
    "Hugging Face, INT4": ["--to", "hf", "--quantization-bit-width", "4"],
    "Megatron": ["--to", "megatron"],
}


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


def copy(source: Path, target: Path) -> None:
    """Copies the files and brings them to the disk."""
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(command: list[str], num_bytes: int) -> dict[str, float]:
    """Time, processor time and memory of a process that reads so many bytes."""
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
        "gb_per_second": num_bytes / 1e9 / seconds,
        "memory_gb": float(held[-1]) if held else float("nan"),
        "announced_gb": float(announced[1]) if announced else float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    dimensions = Dimensions(args.layers, 4096, 10880, 64, 150528)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        source = RandomSource(dimensions)
        writer = SATWriter(source.settings, 8, torch.float16, None)
        (folder / "sat").mkdir()
        writer.write(folder / "sat", 49300, source.read)
        size = writer.num_bytes
        plain = [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; sys.path[:0] = ['.'];"
            "from benchmarks.convert_checkpoint import copy; copy(*map(Path, sys.argv[1:]))",
        ]
        for label in ["copy", *args.targets, "copy again"]:
            if label in TARGETS:
                command = [sys.executable, str(TOOL), "--from", "sat", *TARGETS[label],
                           "--load", str(folder / "sat"), "--save", str(folder / "result")]
            else:
                command = [*plain, str(folder / "sat"), str(folder / "result")]
            rows.append({"result": label} | measure(command, size))
            print(rows[-1], flush=True)
            shutil.rmtree(folder / "result")
    print_table(rows)
    settings = {"bytes": size, **asdict(dimensions), "load_average": os.getloadavg()[0]}
    print(f"record: {write_record('convert_checkpoint', settings, rows)}")


if __name__ == "__main__":
    main()
