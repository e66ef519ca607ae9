"""Files of many gigabytes that do not fill the page cache on their way to the disk."""

import io
import os
from pathlib import Path
from typing import BinaryIO

_STEP_BYTES = 64 << 20


class _WriteBehind(io.FileIO):
    """Has the kernel write and forget what was written, a step at a time.

    Left alone, it takes a fresh page for each one written, which costs more time than all else in
    a conversion, drops what others keep in the cache, and leaves the writing for the end.
    """

    _new_bytes = 0

    def write(self, data) -> int:
        count = super().write(data)
        self._new_bytes += count
        if self._new_bytes >= _STEP_BYTES and hasattr(os, "posix_fadvise"):
            # Starts writing what is new and drops what earlier calls have written.
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._new_bytes = 0
        return count


def create(path: Path) -> BinaryIO:
    """An empty file for reading and writing."""
    return io.BufferedRandom(_WriteBehind(path, "w+"))
