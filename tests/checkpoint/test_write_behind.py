"""Large files are written to the disk and leave the page cache while they grow."""

import os

import pytest

from megatron_glm.checkpoint import write_behind


@pytest.fixture
def advice(monkeypatch):
    """What the kernel was told, by file."""
    given = []
    monkeypatch.setattr(write_behind, "_STEP_BYTES", 1000)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda *arguments: given.append(arguments), raising=False
    )
    return given


def test_the_kernel_is_told_once_a_step(tmp_path, advice):
    data = os.urandom(50_000)
    with write_behind.create(tmp_path / "file") as file:
        for start in range(0, len(data), 10_000):
            file.write(data[start : start + 10_000])
            file.write(b"x")
        number = file.fileno()
    written = (tmp_path / "file").read_bytes()
    assert written == b"x".join(data[i : i + 10_000] for i in range(0, 50_000, 10_000)) + b"x"
    assert advice and set(advice) == {(number, 0, 0, os.POSIX_FADV_DONTNEED)}
    assert len(advice) <= len(data) / 1000


def test_what_was_written_can_be_changed(tmp_path, advice):
    with write_behind.create(tmp_path / "file") as file:
        file.write(bytes(100_000))
        end = file.tell()
        file.seek(50)
        file.write(b"header")
        file.seek(end)
        file.write(b"end")
    expected = bytearray(100_000)
    expected[50:56] = b"header"
    assert (tmp_path / "file").read_bytes() == expected + b"end"


def test_a_system_without_advice_writes_all_the_same(tmp_path, advice, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    with write_behind.create(tmp_path / "file") as file:
        file.write(bytes(5000))
    assert (tmp_path / "file").stat().st_size == 5000
    assert not advice
