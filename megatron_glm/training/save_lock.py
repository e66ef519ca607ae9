"""One run at a time saves into a directory.

Two that do, as when a job is queued again while it still runs, each overwrite the other's
checkpoints, and what is left is a mixture of both.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from megatron_glm.errors import GLMError
from megatron_glm.file_lock import take_lock

LOCK = "run.lock"


class SaveLockError(GLMError):
    """Another run saves into the same directory."""


@contextmanager
def saving_alone(directory: str | Path | None, rank: int) -> Iterator[None]:
    """Keeps other runs from saving into `directory` while this one does.

    The kernel takes the lock back when the process ends, however that happens. rank: the first one
    locks for all. SaveLockError where another run is there; a warning where the file system knows
    no locks.
    """
    if directory is None or rank != 0:
        yield
        return
    path = Path(directory, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        if not take_lock(file):
            file.seek(0)
            raise SaveLockError(
                f"--save {directory}: another run saves there ({file.read().strip()}); wait for "
                "its end, or give another directory"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, "
                   f"since {datetime.now().isoformat(' ', 'seconds')}\n")
        file.flush()
        yield
