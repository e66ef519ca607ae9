"""Processes that train and take turns, so that what else the machine does falls on all alike.

A process builds its model, then waits before every step for its order; the driver gives orders in
rounds. Each has a process of its own since Megatron's state is global and memory is measured.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention import visible_pairs
from benchmarks.records import reason
from benchmarks.training.components import start_profile, stop_profile
from benchmarks.training.work import Load, Size


class Task(NamedTuple):
    """What a process trains."""

    program: str
    """Module whose `run(task, turns)` trains until it is stopped."""
    size: Size
    dtype: str = "bf16"
    dropout: float = 0.0
    flags: tuple[str, ...] = ()
    """More flags for the training program, which override its own."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """What else the program wants to know."""


class Failure(Exception):
    """A process ended or gave no answer; the message says why."""


class Turns:
    """The process's side: `before_step` is called before every step and takes the orders."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.variant = ""
        """What the driver wants the steps of this round to be."""
        self.num_parameters: int | None = None
        """Of the model, once it is built."""
        self._left = self._num_steps = 0
        self._profile = None

    def before_step(self) -> None:
        """Blocks until the next step may begin; raises SystemExit when there is none."""
        if self._left == 0:
            self._connection.send(self._end_round() if self._num_steps else {})
            order = self._connection.recv()
            if order is None:
                raise SystemExit
            self._begin_round(*order)
        self._left -= 1

    def built(self, *models: torch.nn.Module) -> None:
        """Notes the size of what is trained."""
        self.num_parameters = sum(p.numel() for model in models for p in model.parameters())

    def saw(self, samples: Tensor, num_targets: int) -> None:
        """Notes the mask of a micro-batch, int32 [b, 2, k], and its targets."""
        self._samples.append(samples)
        self._num_targets += num_targets

    def skipped(self, count: int) -> None:
        """Notes optimizer steps that an overflow left out."""
        self._num_skipped += count

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times a part of a step, beside the whole."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._parts.append((name, lambda: begin.elapsed_time(end) / 1e3))
        else:
            begin = time.perf_counter()
            yield
            seconds = time.perf_counter() - begin
            self._parts.append((name, lambda: seconds))

    def _begin_round(self, variant: str, num_steps: int, is_profiled: bool) -> None:
        self.variant, self._left, self._num_steps = variant, num_steps, num_steps
        self._samples: list[Tensor] = []
        self._num_targets = 0
        self._num_skipped = 0
        self._parts: list[tuple[str, Callable[[], float]]] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._profile = start_profile(self.device) if is_profiled else None
        self._begin = time.perf_counter()

    def _end_round(self) -> dict[str, Any]:
        report: dict[str, Any]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._begin
        report = {"seconds": seconds / self._num_steps, "device": self.device.type}
        if self.num_parameters is not None:
            report["parameters"] = self.num_parameters
        for name, part in self._parts:
            report[f"{name}_s"] = report.get(f"{name}_s", 0.0) + part() / self._num_steps
        if self._profile is not None:
            report["components"] = {
                name: part / self._num_steps
                for name, part in stop_profile(self._profile, self.device).items()
            }
        if self._samples:
            pairs = sum(visible_pairs(samples.cpu()) for samples in self._samples)
            report["load"] = Load(pairs / self._num_steps, self._num_targets / self._num_steps)
        if self._num_skipped:
            report["skipped"] = self._num_skipped
        if self.device.type == "cuda":
            report["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return report


class Trainer:
    """The driver's side of one process."""

    def __init__(self, context: BaseContext, task: Task, folder: Path):
        """folder: of the files that the process makes, its log among them."""
        folder.mkdir(parents=True)
        self._log = folder / "log"
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(task, other, folder))
        self._process.start()
        other.close()

    def steps(
        self, variant: str | None = None, number: int = 0, is_profiled: bool = False,
        *, seconds: float,
    ) -> dict[str, Any]:  # fmt: skip
        """Has the process take some steps and returns what they took, each on average.

        Without a variant it waits until the model is built. Raises Failure after so many seconds,
        or when the process has ended.
        """
        try:
            if variant is not None:
                self._connection.send((variant, number, is_profiled))
            if not self._connection.poll(max(seconds, 0)):
                raise Failure(f"no answer within {seconds:.0f} s")
            report = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise Failure(f"the process ended with status {self._process.exitcode}") from None
        if "error" in report:
            raise Failure(report["error"])
        return report

    def stop(self) -> None:
        """Ends the process, which frees its memory."""
        try:
            self._connection.send(None)
            self._process.join(2)
        except OSError:
            pass
        self._process.kill()
        self._process.join()
        self._connection.close()

    def log(self, num_lines: int = 15) -> str:
        """The last lines that the process has printed."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-num_lines:])


def _work(task: Task, connection: Connection, folder: Path) -> None:
    """The body of a process."""
    with (folder / "log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    # As in a program that torchrun starts: its data loaders fork.
    multiprocessing.set_start_method("fork", force=True)
    os.chdir(folder)
    try:
        program: Callable[[Task, Turns], None] = import_module(task.program).run
        program(task, Turns(connection))
    except SystemExit as end:
        if end.code:
            connection.send({"error": f"{task.program} ended with status {end.code}"})
    except BaseException as error:
        traceback.print_exc()
        connection.send({"error": reason(error)})
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Whatever threads and workers are left must not keep the memory.
    os._exit(0)
