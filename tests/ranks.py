"""Several gloo ranks inside a test: `run_ranks(function, *args, world_size=2)`.

Importing Megatron takes seconds a process, so one server process imports it once for the whole
session and every rank is a fork of that server: a rank starts in a tenth of a second, one thread
each, and no state outlives the call.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
# Seconds that the other ranks have to notice that one has failed.
GRACE_S = 10.0
# What the server imports before its first rank.
_preload = "tests.rank_preload"


class RankError(AssertionError):
    """A rank raised, died or did not end in time; the message holds every rank's traceback."""


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    timeout: float = 120.0,
    initialize: bool = True,
    seed: int = 1234,
    **layout: Any,
) -> list[Any]:
    """Call `function(*args)` on `world_size` gloo ranks and return their results in rank order.

    `function` must be importable by name (defined at the top of a test file); arguments and
    results are pickled. `layout` goes to Megatron's `initialize_model_parallel`, for example
    `tensor_model_parallel_size=2`, and `seed` to its random states. With `initialize=False` only
    the environment of torchrun is set up, for a function that starts everything by itself.
    Raises RankError after `timeout` seconds or when a rank fails.
    """
    context = warm_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = pickle.dumps((function, args))
    setup = {"seed": seed, "timeout": timeout, "layout": layout} if initialize else None
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder, str(rank)) for rank in range(world_size)]
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _torchrun_environment(rank, world_size, store.port)
            process = context.Process(
                target=_rank, args=(sender, call, environment, setup, stacks[rank])
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            answers = _collect(pipes, timeout)
            late = [rank for rank, answer in enumerate(answers) if answer is None]
            for rank in late:
                answers[rank] = (False, _stack_of(processes[rank], stacks[rank], timeout))
        finally:
            for process in processes:
                # With what it started itself: saving a checkpoint takes a process of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
    if not all(good for good, _ in answers):
        raise RankError(
            "\n".join(f"rank {r}: {what}" for r, (good, what) in enumerate(answers) if not good)
        )
    return [pickle.loads(value) for _, value in answers]


@contextlib.contextmanager
def preloading(module: str) -> Iterator[None]:
    """Meanwhile the ranks are forks of a server of their own, which imports `module` instead."""
    global _preload
    before, _preload = _preload, module
    forkserver._forkserver._stop()
    try:
        yield
    finally:
        _preload = before
        forkserver._forkserver._stop()


def warm_context() -> multiprocessing.context.BaseContext:
    """A context whose processes are forks of a server that has imported Megatron, without GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_preload])
    # The server takes its module path and its devices from the environment at its start.
    path = os.pathsep.join([str(ROOT), *sys.path])
    with _environment(PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _rank(sender, call: bytes, environment: dict, setup: dict | None, stack: Path) -> None:
    """The body of one rank: answer (True, pickled result) or (False, traceback)."""
    os.setpgid(0, 0)
    os.environ.update(environment)
    with stack.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            function, args = pickle.loads(call)
            if setup is not None:
                _start_megatron(**setup)
            answer = (True, pickle.dumps(function(*args)))
        except BaseException:
            answer = (False, traceback.format_exc())
        sender.send(answer)
        sender.close()
        if answer[0] and dist.is_initialized():
            # A rank that leaves early would break a collective in which others still are.
            with contextlib.suppress(RuntimeError):
                dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: whatever the test left behind must not keep the process alive.
    os._exit(0)


def _start_megatron(seed: int, timeout: float, layout: dict[str, Any]) -> None:
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    parallel_state.initialize_model_parallel(**layout)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _collect(pipes: list, timeout: float) -> list[tuple[bool, Any] | None]:
    """What each rank answered; None where it did not in time."""
    answers: list[tuple[bool, Any] | None] = [None] * len(pipes)
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    while open_pipes and (left := deadline - time.monotonic()) > 0:
        for pipe in connection.wait(list(open_pipes), left):
            rank = open_pipes.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = (False, "the process died without a Python exception")
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers


def _stack_of(process: multiprocessing.Process, stack: Path, timeout: float) -> str:
    """Where a rank that gave no answer stands."""
    os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return f"no answer (limit {timeout:g} s); it stood at\n{stack.read_text()}"


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
