"""A preprocessing run: blocks go to the workers, results come back in order."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from megatron_glm.data.preprocessing.blocks import Block, read_blocks
from megatron_glm.data.preprocessing.encoding import EncodedBlock, Encoder
from megatron_glm.data.preprocessing.inputs import InputFile
from megatron_glm.data.preprocessing.output import REJECTS, Output
from megatron_glm.data.preprocessing.snapshot import Snapshot
from megatron_glm.errors import GLMError

# Blocks per worker that are read ahead: enough to keep it busy, few enough to bound the memory.
BLOCKS_AHEAD = 3


def num_processors() -> int:
    """Processors that this process may use; a scheduler may have given it a part of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(
    output: Output,
    files: Sequence[InputFile],
    encoder: Encoder,
    text_documents: str,
    workers: int,
    max_rejects: int,
    checkpoint_seconds: float,
    report: Callable[[Snapshot], None],
) -> None:
    """Encodes what the open `output` does not hold yet and appends it; `finish` remains to be done.

    workers: processes, from 1. max_rejects: documents that may be left out. checkpoint_seconds:
    what a kill costs at most. report: called with the state of the output after every block.
    GLMError where an input cannot be read, too much is rejected, or a worker dies; all that was
    encoded before is kept.
    """
    check_rejects(output, max_rejects)
    blocks = read_blocks(files, encoder.keys, text_documents, output.now.cursor)
    saved = time.monotonic()
    try:
        for block in _encode_all(blocks, encoder, workers):
            output.append(block)
            report(output.now)
            check_rejects(output, max_rejects)
            if time.monotonic() - saved >= checkpoint_seconds:
                output.checkpoint()
                saved = time.monotonic()
    except BrokenProcessPool as error:
        raise GLMError(
            f"a worker was killed, probably for want of memory; run the same command again with "
            f"fewer than --workers {workers}, it goes on where it was"
        ) from error
    finally:
        output.checkpoint()


def check_rejects(output: Output, max_rejects: int) -> None:
    """GLMError where more was rejected than is allowed."""
    if output.now.num_rejects > max_rejects:
        raise GLMError(
            f"--max-rejects {max_rejects}: {output.now.num_rejects} documents are bad, the last in "
            f"{output.last_reject()}; {output.folder / REJECTS} lists them. Repair the inputs, or "
            "run again with a larger --max-rejects, which goes on from here"
        )


def _encode_all(
    blocks: Iterator[Block], encoder: Encoder, workers: int
) -> Iterator[EncodedBlock]:
    """The encoded blocks in order; where reading fails, all blocks before come first."""
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_start_worker, initargs=(encoder, os.getpid())
    )
    failure = None
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        # All workers are forked here, before anything starts a thread in this process.
        pool.submit(_do_nothing).result()
        while True:
            while failure is None and len(pending) < workers * BLOCKS_AHEAD:
                try:
                    block = next(blocks)
                except StopIteration:
                    break
                except GLMError as error:
                    failure = error
                    break
                pending.append(pool.submit(_encode_here, block))
            if not pending:
                break
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
    if failure is not None:
        raise failure


_encoder: Encoder


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _encoder
    _encoder = encoder
    # One process, one thread: the processes are what runs in parallel.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    # A killed parent cannot end its workers, and they hold both ends of the pipe they wait on.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_here(block: Block) -> EncodedBlock:
    return _encoder.encode(block)


def _do_nothing() -> None:
    pass
