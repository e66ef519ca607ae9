"""Cached arrays are those that were made, whole, and of use to whoever shares the folder."""

import errno
import os

import numpy as np
import pytest

from megatron_glm.data import array_cache
from megatron_glm.data.array_cache import load_or_make
from megatron_glm.data.config import DataError


@pytest.fixture(autouse=True)
def cache_everything(monkeypatch):
    monkeypatch.setattr(array_cache, "_LEAST_CACHED", 1)


def load(folder, size=5):
    return load_or_make(str(folder), "name", size, lambda: (np.arange(size), np.ones(3)))


def test_arrays_are_made_once(tmp_path):
    for made in load(tmp_path), load_or_make(str(tmp_path), "name", 5, lambda: pytest.fail()):
        np.testing.assert_array_equal(made[0], np.arange(5))
        np.testing.assert_array_equal(made[1], np.ones(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name-0.npy", "name-1.npy"]


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        load(tmp_path / "cache")
    finally:
        os.umask(before)
    assert (tmp_path / "cache" / "name-0.npy").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(DataError, match=f"--data-cache-path {tmp_path}: .*No space left"):
        load(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"text"])
def test_a_damaged_file_is_named(tmp_path, content):
    load(tmp_path)
    (tmp_path / "name-0.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"name-0\.npy: damaged .*delete name-\*\.npy"):
        load(tmp_path)


def test_a_file_of_another_size_is_named(tmp_path):
    load(tmp_path, 4)
    with pytest.raises(DataError, match="4 numbers instead of 5"):
        load(tmp_path, 5)
