"""Runs of a tool's `main` in processes that start in milliseconds.

They are forked from a server that has imported the tools once, and, unlike the process of the
tests and the server of `run_ranks`, neither torch nor a thread.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(["tests.tools.forked_preload"])


class Result(NamedTuple):
    code: int
    output: str


def start(module, argv, log, setup=None, setup_args=()):
    """A running process of `module`.main() with its output in the file `log`; `setup` is called in
    it first."""
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(ROOT)
    process = context.Process(
        target=_main, args=(module, [str(arg) for arg in argv], str(log), setup, setup_args)
    )
    with pytest.MonkeyPatch.context() as patch:
        # A context knows one server of the process, that of `run_ranks`.
        patch.setattr(forkserver, "connect_to_new_process", SERVER.connect_to_new_process)
        process.start()
    return process


def run(module, argv, log, setup=None, setup_args=()):
    """Exit code and output of a whole run; what an earlier one has left in `log` is dropped."""
    Path(log).unlink(missing_ok=True)
    process = start(module, argv, log, setup, setup_args)
    process.join()
    return Result(process.exitcode, Path(log).read_text() if Path(log).exists() else "")


def _main(module, argv, log, setup, setup_args):
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    imported = __import__(module, fromlist=["main"])
    if setup:
        setup(*setup_args)
    sys.argv = [module, *argv]
    imported.main()
