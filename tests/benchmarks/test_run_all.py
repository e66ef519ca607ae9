"""One command runs the benchmarks in order, each within its limit."""

import re
import time

import pytest

from benchmarks import run_all
from benchmarks.run_all import Run

PROGRAM = """
import argparse, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--results")
parser.add_argument("--minutes", type=float)
parser.add_argument("--sleep", type=float, default=0)
parser.add_argument("--status", type=int, default=0)
arguments = parser.parse_args()
print("minutes", arguments.minutes)
print("PASS speed: 2 >= 1 required")
time.sleep(arguments.sleep)
print("FAIL memory: 2 <= 1 required")
sys.exit(arguments.status)
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Lets benchmarks.some be PROGRAM, and these the runs."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "some.py").write_text(PROGRAM)
    monkeypatch.setattr(run_all, "ROOT", tmp_path)

    def set_runs(**runs):
        monkeypatch.setattr(run_all, "RUNS", runs)

    return set_runs


def summary(capsys):
    return capsys.readouterr().out.partition("== summary\n")[2].splitlines()


def test_every_run_is_told_with_its_figures(runs, capsys, tmp_path):
    runs(first=Run(("some",), 1), second=Run(("some",), 1, knows_minutes=True))
    run_all.main(["--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.index("== first") < out.index("minutes None") < out.index("minutes 0.75")
    lines = out.partition("== summary\n")[2].splitlines()
    figures = ["  PASS speed: 2 >= 1 required", "  FAIL memory: 2 <= 1 required"]
    assert lines == [
        "first: done after 0.0 min", *figures, "second: done after 0.0 min", *figures
    ]  # fmt: skip


def test_a_run_is_stopped_at_its_limit_and_the_next_goes_on(runs, capsys):
    runs(slow=Run(("some", "--sleep", "60"), 0.1), wrong=Run(("some", "--status", "3"), 1))
    begin = time.monotonic()
    with pytest.raises(SystemExit):
        run_all.main([])
    assert time.monotonic() - begin < 30
    lines = summary(capsys)
    assert lines[0].startswith("slow: stopped at its limit after 0.1 min")
    assert lines[1] == "  PASS speed: 2 >= 1 required"
    assert lines[2].startswith("wrong: ended with 3")


def test_what_is_not_reached_is_named(runs, capsys, monkeypatch):
    monkeypatch.setattr(run_all, "LEAST_MINUTES", 0.1)
    runs(
        first=Run(("some", "--sleep", "60"), 0.05), second=Run(("some",), 1),
        third=Run(("some",), 1),
    )  # fmt: skip
    with pytest.raises(SystemExit):
        run_all.main(["--minutes", "0.11"])
    assert summary(capsys)[-1] == "not reached; go on with --only second third"


@pytest.mark.parametrize("run", run_all.RUNS.values(), ids=run_all.RUNS)
def test_the_benchmarks_exist_and_are_described(run):
    folder = run_all.ROOT / "benchmarks"
    assert (folder / f"{run.words[0]}.py").is_file()
    command = " ".join(word for word in run.words if word != "--plot")
    described = (folder / "README.md").read_text()
    assert re.search(rf"\| `{command}` \|.*\| {run.minutes:g} \|\n", described)
