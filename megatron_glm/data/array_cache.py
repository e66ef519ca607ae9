"""Arrays that take long to make, made once and mapped by every process that needs them."""

import contextlib
import os
import uuid
from collections.abc import Callable

import numpy as np

from megatron_glm.data.config import DataError

# Shorter arrays are made faster than files are opened.
_LEAST_CACHED = 1 << 20


def load_or_make(
    cache_dir: str | None,
    name: str,
    size: int,
    make: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays, the first of length `size`, from `cache_dir` where they are many numbers.

    name: must tell all that shapes the arrays. Raises DataError where a file is damaged, or
    cannot be written.
    """
    if cache_dir is None or size < _LEAST_CACHED:
        return make()
    paths = [os.path.join(cache_dir, f"{name}-{number}.npy") for number in range(2)]
    if not all(map(os.path.isfile, paths)):
        for path, values in zip(paths, make(), strict=True):
            _save_whole(path, values)
    try:
        first, second = (np.load(path, mmap_mode="r") for path in paths)
    except (ValueError, EOFError) as error:
        raise DataError(f"{paths[0]}: damaged ({error}); delete {name}-*.npy") from error
    if len(first) != size:
        raise DataError(f"{paths[0]}: {len(first)} numbers instead of {size}; delete {name}-*.npy")
    return first, second


def _save_whole(path: str, values: np.ndarray) -> None:
    """Writes a file that other processes see whole or not at all, and others may read."""
    partial = f"{path}.{uuid.uuid4().hex}.partial"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "xb") as stream:
            np.save(stream, values)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise DataError(
            f"--data-cache-path {os.path.dirname(path)}: cannot be written ({error}); make room, "
            "or give another folder"
        ) from error
