"""tools/find_python.sh believes a Python only after running it, wherever it finds it."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "find_python.sh"


@pytest.fixture
def machine(tmp_path):
    """An empty machine: a HOME, and a PATH with only the programs that the script uses."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "bash").symlink_to("/bin/bash")
    (bin_dir / "cat").symlink_to("/bin/cat")
    return tmp_path


def put_python(path, version, has_venv=True, runs=True):
    """A program that answers the script's two questions as a Python of that version would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ask_venv = "exit 0" if has_venv else "exit 1"
    answer = f'case "$2" in *ensurepip*) {ask_venv} ;; *) echo {version} ;; esac'
    path.write_text(f"#!/bin/bash\n{answer if runs else 'exit 127'}\n")
    path.chmod(0o755)
    return path


def find(machine, **env):
    env = {"PATH": str(machine / "bin"), "HOME": str(machine)} | env
    return subprocess.run([SCRIPT], env=env, capture_output=True, text=True, timeout=30)


def test_a_python_on_path_is_found(machine):
    python = put_python(machine / "bin/python3", "3.13")
    assert find(machine).stdout.strip() == str(python)


def test_a_pyenv_shim_that_does_not_run_gives_way_to_the_version_behind_it(machine):
    put_python(machine / "bin/python3.12", "3.12", runs=False)
    python = put_python(machine / ".pyenv/versions/3.12.1/bin/python3", "3.12")
    assert find(machine).stdout.strip() == str(python)


def test_pyenv_root_is_searched(machine):
    python = put_python(machine / "elsewhere/versions/3.14.0/bin/python3", "3.14")
    assert find(machine, PYENV_ROOT=str(machine / "elsewhere")).stdout.strip() == str(python)


def test_uv_is_asked_last(machine):
    python = put_python(machine / "uv/python3.12", "3.12")
    uv = machine / "bin/uv"
    uv.write_text(f'#!/bin/bash\n[ "$2" = find ] && echo {python}\n')
    uv.chmod(0o755)
    assert find(machine).stdout.strip() == str(python)


def test_uv_is_asked_to_install_one_where_it_has_none(machine):
    uv = machine / "bin/uv"
    uv.write_text(
        f'#!/bin/bash\nif [ "$2" = install ]; then printf x > {machine}/installed\n'
        f"elif [ -e {machine}/installed ]; then echo {machine}/python3.12\nelse exit 2; fi\n"
    )
    uv.chmod(0o755)
    python = put_python(machine / "python3.12", "3.12")
    assert find(machine).stdout.strip() == str(python)


def test_a_named_python_is_the_only_one_looked_at(machine):
    put_python(machine / "bin/python3.12", "3.12")
    named = put_python(machine / "mine/python", "3.13")
    assert find(machine, PYTHON=str(named)).stdout.strip() == str(named)
    wrong = find(machine, PYTHON=str(machine / "mine/absent"))
    assert wrong.returncode == 1 and "no such program" in wrong.stderr


@pytest.mark.parametrize(
    "version, has_venv, reason",
    [("3.11", True, "is Python 3.11"), ("3.12", False, "apt-get install python3.12-venv")],
)
def test_failure_names_what_was_found_and_what_to_install(machine, version, has_venv, reason):
    python = put_python(machine / "bin/python3", version, has_venv)
    result = find(machine)
    assert result.returncode == 1 and result.stdout == ""
    assert f"{python}: " in result.stderr and reason in result.stderr
    assert "uv python install 3.12" in result.stderr
