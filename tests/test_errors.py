"""How a program ends: one line for what a user can cure, a traceback for its own faults."""

import errno
import subprocess
import sys

import pytest

from megatron_glm.errors import FlagError, GLMError, exit_with_one_line


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/tool.py", "--flag"])


def ending(capsys, error, **options):
    """Exit status of a program that raises `error`, and what it prints on standard error."""
    with pytest.raises(SystemExit) as stop:
        with exit_with_one_line(**options):
            raise error
    return stop.value.code, capsys.readouterr().err


def test_an_error_of_the_user_is_one_line(capsys):
    assert ending(capsys, GLMError("--flag 3: must be 4")) == (
        2, "tool.py: error: --flag 3: must be 4\n"
    )


@pytest.mark.parametrize("error, line", [
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"),
     "a.json: No such file or directory"),
    (PermissionError(errno.EACCES, "Permission denied", "b"), "b: Permission denied"),
    (FileNotFoundError("the tracker names no whole checkpoint"),
     "the tracker names no whole checkpoint"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_named(capsys, error, line):
    assert ending(capsys, error) == (2, f"tool.py: error: {line}\n")


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "no file is named")])
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        with exit_with_one_line():
            raise error


def test_ctrl_c_is_one_line_and_the_status_of_a_shell(capsys):
    assert ending(capsys, KeyboardInterrupt()) == (130, "\ntool.py: interrupted\n")
    assert ending(capsys, KeyboardInterrupt(), after_interrupt="run it again") == (
        130, "\ntool.py: interrupted; run it again\n"
    )


def test_a_rank_or_machine_that_fails_alone_is_heard_and_flags_are_spoken_of_once(capsys):
    error = GLMError("data.bin: no such file")
    assert ending(capsys, error, rank=5) == (2, "rank 5: tool.py: error: data.bin: no such file\n")
    assert ending(capsys, error, rank=8, local_rank=0)[1].startswith("rank 8: ")
    for alike in (error, FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json")):
        assert ending(capsys, alike, rank=5, local_rank=5) == (2, "")
    assert ending(capsys, FlagError("--swiglu: drop it"), rank=5) == (2, "")
    with pytest.raises(SystemExit), exit_with_one_line(AssertionError, rank=5):
        raise AssertionError("batch sizes do not fit")
    assert capsys.readouterr().err == ""


def test_an_assertion_without_words_shows_what_it_asserted(capsys, tmp_path):
    # In a file of its own: pytest gives words to the assertions of a test.
    module = tmp_path / "silent.py"
    module.write_text("assert save_interval is not None\n")
    with pytest.raises(SystemExit):
        with exit_with_one_line(AssertionError):
            exec(compile(module.read_text(), str(module), "exec"), {"save_interval": None})
    assert "assert save_interval is not None" in capsys.readouterr().err


def test_an_error_of_a_data_loader_is_the_error_of_its_worker(capsys):
    """torch puts the traceback of the worker into the message."""
    message = (
        "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        'last):\n  File "x.py", line 3, in f\nmegatron_glm.data.config.DataError: data.bin: id 7\n'
    )
    assert ending(capsys, GLMError(message)) == (2, "tool.py: error: data.bin: id 7\n")


def test_a_reader_that_goes_away_is_no_error():
    program = (
        "from megatron_glm.errors import exit_with_one_line\n"
        "with exit_with_one_line():\n"
        "    for _ in range(100_000):\n"
        "        print('a line')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "a line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
