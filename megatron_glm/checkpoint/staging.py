"""A result that is there whole or not at all: written under a temporary name, then renamed."""

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_glm.checkpoint.errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of write(2), which name no file.
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file grew beyond what `ulimit -f` or the file system allows",
}


@contextlib.contextmanager
def staged_directory(target: Path, num_bytes: int, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes `target` on leaving the block without an error.

    A process that dies inside the block leaves `target` as it was, and a `<target>.partial` that
    the next attempt removes. `num_bytes` is checked against the free space first. CheckpointError
    where `target` holds something and not `overwrite`, where another process is writing it, and
    where the disk is full or a file may not be as large.
    """
    target = Path(os.path.abspath(target))
    partial = target.with_name(target.name + ".partial")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"--save {target}: is a file, and a folder is to be written")
    if holds_something(target) and not overwrite:
        raise CheckpointError(
            f"--save {target}: exists and is not empty; give another folder, or --overwrite"
        )
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--save {target}: cannot be written ({error})") from None
    with _write_errors(target, num_bytes), _locked_empty(partial):
        try:
            _check_space(partial, num_bytes)
            yield partial
            _sync(partial)
            _replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        # After an exchange it holds what `target` held before.
        shutil.rmtree(partial, ignore_errors=True)


def holds_something(path: Path) -> bool:
    """Whether a path is a folder with anything in it."""
    return path.is_dir() and any(path.iterdir())


@contextlib.contextmanager
def _write_errors(target: Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise CheckpointError(
            f"--save {target}: {_REASONS[error.errno]}; {num_bytes / 1e9:.3f} GB are needed in "
            "all. Nothing was left behind"
        ) from error


@contextlib.contextmanager
def _locked_empty(partial: Path) -> Iterator[None]:
    """Removes what a dead process left in the folder and keeps living ones away from it; the kernel
    frees the lock when this one dies."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Meanwhile its owner may have renamed it into place.
            ours = partial.exists() and os.path.samestat(partial.stat(), os.fstat(descriptor))
        except BlockingIOError:
            ours = False
        if not ours:
            raise CheckpointError(
                f"--save {partial.with_suffix('')}: another process is writing it"
            )
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(descriptor)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"--save {folder.with_suffix('')}: {num_bytes / 1e9:.3f} GB are needed and "
            f"{free / 1e9:.3f} GB are free"
        )


def _sync(folder: Path) -> None:
    """Brings the files to the disk, so that the rename never gets there before them."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    if not holds_something(target):
        # rename(2) replaces an empty folder, but nothing else.
        os.rename(partial, target)
    elif not _exchange(partial, target):
        old = target.with_name(target.name + ".old")
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the file system or the C library cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return not rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
