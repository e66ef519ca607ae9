"""Two runs do not write into one --save at once, and a killed one is not in the way."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_glm.errors import GLMError
from megatron_glm.training.save_lock import LOCK, saving_alone

ROOT = Path(__file__).parents[2]
HOLD = (
    "import sys, time\n"
    "from megatron_glm.training.save_lock import saving_alone\n"
    "with saving_alone(sys.argv[1], rank=0):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.fixture
def other_run(tmp_path):
    """Another process that saves into tmp_path / "run"."""
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_directory_that_another_run_saves_into_is_refused(tmp_path, other_run):
    with pytest.raises(GLMError) as caught:
        with saving_alone(tmp_path / "run", rank=0):
            pass
    message = str(caught.value)
    assert f"--save {tmp_path / 'run'}: " in message and f"process {other_run.pid} on " in message
    assert "\n" not in message


def test_a_killed_run_is_not_in_the_way(tmp_path, other_run):
    other_run.kill()
    other_run.wait()
    with saving_alone(tmp_path / "run", rank=0):
        pass


@pytest.mark.parametrize("directory, rank", [("run", 1), (None, 0)])
def test_the_first_rank_alone_takes_the_lock_and_only_where_it_saves(
    tmp_path, other_run, directory, rank
):
    with saving_alone(directory and tmp_path / directory, rank):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with saving_alone(tmp_path, rank=0):
        assert str(tmp_path / LOCK) in caplog.text
