"""One command runs the benchmarks in order, each within its limit."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.run_all import Run

PROGRAM = """
import argparse, json, subprocess, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("--results", type=Path)
parser.add_argument("--minutes", type=float)
parser.add_argument("--sleep", type=float, default=0)
parser.add_argument("--status", type=int, default=0)
arguments = parser.parse_args()
print("minutes", arguments.minutes, flush=True)
check = {"what": "speed", "value": 2, "bound": 1, "is_floor": True, "why": "", "passed": True}
other = {"what": "memory", "value": None, "bound": 1, "is_floor": False, "why": "no room"}
if arguments.minutes and arguments.minutes < 0.5:
    other["why"] = "glm: not reached in the given minutes"
record = arguments.results / f"some-{time.time_ns()}.json"
record.write_text(json.dumps({"rows": [], "checks": [check, other]}))
if arguments.sleep:
    child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({arguments.sleep})"])
    (arguments.results / "child").write_text(str(child.pid))
    time.sleep(arguments.sleep)
sys.exit(arguments.status)
"""
FIGURES = ["  PASS speed: 2 >= 1 required", "  NOT MEASURED memory, <= 1 required: no room"]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Lets benchmarks.some be PROGRAM, runs these runs and returns what was printed."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "some.py").write_text(PROGRAM)
    monkeypatch.setattr(run_all, "ROOT", tmp_path)

    def run(*flags, **runs):
        monkeypatch.setattr(run_all, "RUNS", runs)
        run_all.main(["--results", str(tmp_path), *flags])

    run.out = lambda: capfd.readouterr().out
    return run


def summary(out):
    return out.partition("== summary\n")[2].splitlines()


def has_ended(pid: int) -> bool:
    """Whether a process, or what is left of it for its parent to see, no longer runs."""
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_every_run_is_told_with_its_figures(run):
    run(first=Run(("some",), 1, knows_minutes=True), second=Run(("some",), 1))
    out = run.out()
    assert out.index("== first") < out.index("minutes 0.75") < out.index("minutes None")
    assert summary(out) == [
        "first: done after 0.0 min", *FIGURES, "second: done after 0.0 min", *FIGURES
    ]  # fmt: skip


def test_a_run_is_stopped_at_its_limit_and_the_next_goes_on(run, tmp_path):
    begin = time.monotonic()
    with pytest.raises(SystemExit):
        run(slow=Run(("some", "--sleep", "60"), 0.05), wrong=Run(("some", "--status", "3"), 1))
    assert time.monotonic() - begin < 30
    slow, *of_slow, wrong, _, _ = summary(run.out())
    assert slow.startswith("slow: stopped at its limit after 0.") and of_slow == FIGURES
    assert wrong.startswith("wrong: ended with 3")
    assert has_ended(int((tmp_path / "child").read_text()))


def test_what_no_longer_fits_is_left_out_for_what_does_and_named(run):
    run("--minutes", "2", first=Run(("some",), 3), second=Run(("some",), 2.5),
        third=Run(("some",), 1))
    out = run.out()
    assert "== first, up to 2 of 2 minutes" in out and "go on with --only first second third" in out
    assert [line for line in summary(out) if line not in FIGURES] == [
        "first: done after 0.0 min", "third: done after 0.0 min",
        "not done, 2.5 minutes at most: go on with --only second",
    ]  # fmt: skip


def test_one_that_ended_before_its_figures_is_not_done_and_the_last_has_all_that_is_left(run):
    with pytest.raises(SystemExit):
        run("--minutes", "3", first=Run(("some",), 0.6, knows_minutes=True), last=Run(("some",), 1))
    out = run.out()
    assert summary(out)[0] == "first: out of minutes after 0.0 min"
    assert re.search(r"== last, up to (2\.99|3) of \1 minutes", out)


@pytest.mark.parametrize("sent, status, told", [
    (signal.SIGTERM, 128 + signal.SIGTERM,
     ["not done, 5 minutes at most: go on with --only start-up decode"]),
    (signal.SIGKILL, -signal.SIGKILL, []),
])  # fmt: skip
def test_a_request_to_end_ends_the_benchmark_too(tmp_path, sent, status, told):
    command = [sys.executable, "-m", "benchmarks.run_all", "--only", "start-up", "decode",
               "--results", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(command, cwd=run_all.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("== start-up")
    time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(sent)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert summary(out) == told
    assert children and all(has_ended(int(child)) for child in children)


@pytest.mark.parametrize("run", run_all.RUNS.values(), ids=run_all.RUNS)
def test_the_benchmarks_exist_and_are_described(run):
    folder = run_all.ROOT / "benchmarks"
    assert (folder / f"{run.words[0]}.py").is_file()
    command = " ".join(word for word in run.words if word != "--plot")
    described = (folder / "README.md").read_text()
    assert re.search(rf"\| `{command}` \|.*\| {run.minutes:g} \|\n", described)
