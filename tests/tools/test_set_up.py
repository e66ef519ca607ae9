"""The set-up in the Makefile is stamped only when it succeeded, and then costs nothing."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Stands in for Python, and for the environment's Python once it has "made" one.
PYTHON = """#!/bin/bash
case "$*" in
    *venv*--clear*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *pip*install*) echo "$*" >> pip.log; [ ! -e pip_hangs ] || sleep 60; [ ! -e pip_fails ] ;;
    *version_info*) echo 3.12 ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    for name in ["Makefile", "constraints.txt", "pyproject.toml", "setup.py"]:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ["find_python.sh", "set_up.sh"]:
        shutil.copy(ROOT / "tools" / name, tmp_path / "tools")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(clone):
    command = ["make", "setup", f"PYTHON={clone / 'python'}"]
    # A make that runs this test must not hand its own flags down.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.Popen(command, cwd=clone, env=env, start_new_session=True)


def installs(clone):
    log = clone / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_the_second_call_installs_nothing(clone):
    assert make(clone).wait(30) == 0
    first = installs(clone)
    assert all("-c constraints.txt" in line for line in first) and ".[test]" in first[-1]
    assert make(clone).wait(30) == 0
    assert installs(clone) == first


def test_changed_pins_are_installed(clone):
    assert make(clone).wait(30) == 0
    before = len(installs(clone))
    os.utime(clone / "constraints.txt", (time.time() + 5, time.time() + 5))
    assert make(clone).wait(30) == 0
    assert len(installs(clone)) > before


def test_a_failed_install_is_done_again(clone):
    (clone / "pip_fails").touch()
    assert make(clone).wait(30) != 0
    assert not (clone / ".venv/.installed").exists()
    (clone / "pip_fails").unlink()
    assert make(clone).wait(30) == 0
    assert (clone / ".venv/.installed").exists()


def test_an_interrupted_install_is_done_again(clone):
    (clone / "pip_hangs").touch()
    process = make(clone)
    deadline = time.monotonic() + 20
    while not installs(clone) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    assert not (clone / ".venv/.installed").exists()
    (clone / "pip_hangs").unlink()
    assert make(clone).wait(30) == 0
