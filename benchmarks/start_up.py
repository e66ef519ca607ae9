"""Times a run from its start to its first steps, by phase: `python -m benchmarks.start_up`.

Starts pretrain_glm.py several times on one rank and a small corpus whose index caches are warm, and
takes the least of each phase: seconds, and seconds of processor time, which other work on the
machine does not lengthen. Flags that this program does not know are handed on. Prints a table and
writes a record.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path

# The processes that are timed import this file too: whatever else it needs is imported below.
ROOT = Path(__file__).parents[1]
LIMIT_S = 30
WHOLE = "start to first step"
FLAGS = [
    "--num-layers", "12", "--hidden-size", "64", "--ffn-hidden-size", "176",
    "--num-attention-heads", "4", "--seq-length", "128", "--micro-batch-size", "4",
    "--global-batch-size", "4", "--train-iters", "3", "--lr", "1e-3", "--eval-iters", "0",
    "--log-interval", "1", "--num-workers", "2",
]  # fmt: skip
# Marked when these functions return, in the order in which a run calls them.
MARKS = {
    "megatron_glm.flags.arguments:parse_glm_args": "flags and tokenizer",
    "megatron.training.training:initialize_megatron": "processes and seeds",
    "megatron_glm.model.glm_model:check_mask_conformance": "model and its conformance check",
    "megatron.training.training:setup_model_and_optimizer": "optimizer",
    "megatron.training.training:build_train_valid_test_data_iterators": "datasets",
    "megatron.training.training:train_step": "first step",
}


class Clock:
    """Seconds since the last mark, and of processor time, by phase."""

    def __init__(self, start: float):
        self.phases: dict[str, tuple[float, float]] = {}
        self._last = start, 0.0

    def mark(self, phase: str) -> None:
        """Ends a phase; one that has been ended is not begun again."""
        if phase not in self.phases:
            now = time.monotonic(), time.process_time()
            self.phases[phase] = tuple(b - a for a, b in zip(self._last, now, strict=True))
            self._last = now

    def after(self, function: Callable, phase: str) -> Callable:
        @wraps(function)
        def marked(*args, **kwargs):
            result = function(*args, **kwargs)
            self.mark(phase)
            return result

        return marked


def run(start: float, record: str, flags: list[str]) -> None:
    """The process that is timed: pretrain_glm.py, started at `start` on the monotonic clock."""
    clock = Clock(start)
    clock.mark("Python")
    import torch  # noqa: F401

    clock.mark("import torch")
    import patches

    patches.apply()
    clock.mark("patches and the Megatron that they patch")
    import pretrain_glm

    clock.mark("import pretrain_glm")
    for path, phase in MARKS.items():
        module, name = path.split(":")
        for holder in (sys.modules[module], pretrain_glm):
            if hasattr(holder, name):
                setattr(holder, name, clock.after(getattr(holder, name), phase))
    sys.argv = ["pretrain_glm.py", *flags]
    pretrain_glm.main()
    Path(record).write_text(json.dumps(clock.phases))


def timed(flags: list[str], folder: Path) -> dict[str, tuple[float, float]]:
    """The phases of one start."""
    record = folder / "phases.json"
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.start_up", "--run", str(time.monotonic()), str(record),
         *flags],
        cwd=ROOT, text=True, capture_output=True, env=os.environ | ranks,
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    return json.loads(record.read_text())


def rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row a phase and, at the end, their sum."""
    from benchmarks.training.corpus import corpus_flags

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        corpus = corpus_flags(folder, vocab_size=512, num_tokens=200_000)
        flags = [*FLAGS, *corpus, *arguments.flags]
        timed(flags, folder)  # fills the caches
        starts = [timed(flags, folder) for _ in range(arguments.starts)]
    total = [0.0, 0.0]
    for phase in starts[0]:
        least = [min(start[phase][i] for start in starts) for i in (0, 1)]
        total = [a + b for a, b in zip(total, least, strict=True)]
        yield {"phase": phase, "seconds": least[0], "processor_s": least[1]}
    yield {"phase": WHOLE, "seconds": total[0], "processor_s": total[1]}


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        run(float(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    import patches

    patches.apply()
    from benchmarks.records import Check, add_run_flags, run_benchmark

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--starts", type=int, default=3)
    add_run_flags(parser)
    arguments, arguments.flags = parser.parse_known_args()

    def judge(rows: list[dict]) -> list[Check]:
        return [
            Check("seconds to the first step", row["seconds"], LIMIT_S, is_floor=False)
            for row in rows
            if row["phase"] == WHOLE
        ]

    run_benchmark("start_up", arguments, rows(arguments), judge=judge)


if __name__ == "__main__":
    main()
