"""A lock on a file that the kernel takes back when the process ends, however that happens."""

import fcntl
import logging
from typing import IO

logger = logging.getLogger(__name__)


def take_lock(file: IO) -> bool:
    """Locks an open file for this process; False where another process has the lock.

    Closing any handle of the file gives it back. Where the file system knows no locks, a warning
    says that nothing keeps others away.
    """
    try:
        # A record lock, unlike flock, is not inherited by workers that outlive a killed process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning("%s: cannot be locked (%s), so nothing keeps another process from writing "
                       "beside it at the same time", file.name, error.strerror)
    return True
