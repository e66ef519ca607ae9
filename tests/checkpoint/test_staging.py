"""A result is there whole or not at all, whatever happens while it is written."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_glm.checkpoint import staging
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.staging import staged_directory

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_the_result_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "result"
    with staged_directory(target, 10) as folder:
        (folder / "a").write_text("new")
        assert not target.exists()
    assert content(target) == {"a": "new"}
    assert [path.name for path in target.parent.iterdir()] == ["result"]


def test_what_is_there_is_kept_unless_it_is_to_be_replaced(old):
    with pytest.raises(CheckpointError, match="not empty.*--overwrite"):
        with staged_directory(old, 10):
            raise AssertionError("never entered")
    with staged_directory(old, 10, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert content(old) == {"old": "old"}
    assert content(old) == {"new": "new"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


def test_without_an_atomic_exchange_two_renames_do_it(old, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    with staged_directory(old, 10, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert content(old) == {"new": "new"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_leaves_nothing_new(old, error):
    with pytest.raises(error):
        with staged_directory(old, 10, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise error
    assert content(old) == {"old": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


@pytest.mark.parametrize("number, reason", [
    (errno.ENOSPC, "the disk is full"),
    (errno.EDQUOT, "the quota of the disk is used up"),
    (errno.EFBIG, "a file grew beyond what `ulimit -f` or the file system allows"),
])  # fmt: skip
def test_a_full_disk_is_one_clear_error(old, number, reason):
    with pytest.raises(CheckpointError, match=f"result: {reason}; 2.000 GB are needed"):
        with staged_directory(old, 2_000_000_000, overwrite=True):
            raise OSError(number, "full")
    assert content(old) == {"old": "old"}


def test_too_little_space_is_found_before_anything_is_written(old):
    with pytest.raises(CheckpointError, match="1000000000.000 GB are needed and .* GB are free"):
        with staged_directory(old, 10**18, overwrite=True):
            raise AssertionError("never entered")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/result: cannot be written"):
        with staged_directory(tmp_path / "file" / "result", 10):
            raise AssertionError("never entered")
    with pytest.raises(CheckpointError, match="file: is a file"):
        with staged_directory(tmp_path / "file", 10, overwrite=True):
            raise AssertionError("never entered")


def test_a_second_writer_is_refused(tmp_path):
    with staged_directory(tmp_path / "a", 10):
        with pytest.raises(CheckpointError, match="another process is writing"):
            with staged_directory(tmp_path / "a", 10):
                raise AssertionError("never entered")


WRITER = """
import sys, time
from pathlib import Path
from megatron_glm.checkpoint.staging import staged_directory
with staged_directory(Path(sys.argv[1]), 10, overwrite=True) as folder:
    for i in range(20):
        (folder / str(i)).write_text("new")
        time.sleep(0.01)
        print(i, flush=True)
"""


@pytest.mark.parametrize("moment", [0, 9, 19])
def test_a_killed_writer_leaves_the_old_or_the_new(old, moment):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(old)], stdout=subprocess.PIPE, cwd=ROOT
    )
    for line in process.stdout:
        if int(line) == moment:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    found = content(old)
    assert found == {"old": "old"} or len(found) == 20
    # The next attempt clears up and goes through.
    with staged_directory(old, 10, overwrite=True) as folder:
        assert not any(folder.iterdir())
        (folder / "b").write_text("b")
    assert content(old) == {"b": "b"}
    assert [path.name for path in old.parent.iterdir()] == ["result"]


def test_files_reach_the_disk_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda *a: events.append("rename") or rename(*a))
    with staged_directory(tmp_path / "a", 10) as folder:
        (folder / "b").write_text("b")
        time.sleep(0)
    assert events == ["sync", "sync", "rename", "sync"]
