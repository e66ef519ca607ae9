"""Processes take turns in rounds; one that fails leaves its reason and the others go on."""

import time

import pytest

from benchmarks.training.rounds import TOO_LATE, WARM_UP_STEPS, Entry, Plan, measure
from benchmarks.training.turns import Task
from benchmarks.training.work import Size
from tests.ranks import warm_context

SIZE = Size(1, 8, 2, 16, 32, 6, 1, 1)


@pytest.fixture
def run(tmp_path):
    """Measures processes given as name -> behaviour by variant; returns outcomes and journal."""

    def run(behaviours, seconds=60.0, num_rounds=2, num_steps=1):
        journal = tmp_path / "journal"
        entries = {
            name: Entry(
                Task(
                    "tests.benchmarks.training.programs", SIZE,
                    options={"name": name, "journal": str(journal)} | behaviour,
                ),
                tuple(behaviour), is_profiled=True,
            )
            for name, behaviour in behaviours.items()
        }  # fmt: skip
        plan = Plan(warm_context(), num_rounds, num_steps, time.monotonic() + seconds)
        return measure(entries, plan, tmp_path / "work"), journal.read_text().split()

    return run


def test_rounds_alternate_between_processes_and_variants(run):
    outcomes, journal = run({"a": {"x": None, "y": None}, "b": {"z": None}}, num_steps=2)
    warm_up = ["a:x"] * WARM_UP_STEPS + ["a:y"] * WARM_UP_STEPS + ["b:z"] * WARM_UP_STEPS
    a_round = ["a:x"] * 2 + ["a:y"] * 2 + ["b:z"] * 2
    assert journal == warm_up + a_round * 2 + ["a:x", "b:z"]
    assert not any(outcome.error for outcome in outcomes.values())
    assert {v: len(r) for v, r in outcomes["a"].reports.items()} == {"x": 2, "y": 2}
    for report in outcomes["a"].reports["x"]:
        assert report["seconds"] >= 0.01
        # Of the samples [0, 4) with a context of 2 and [4, 6) without.
        assert report["load"] == (2 * 2 + (3 + 4) + (1 + 2), 3)
        assert report["parameters"] == 8
    assert sum(outcomes["b"].components.values()) > 0


def test_what_has_no_room_beside_the_others_is_measured_alone(run):
    outcomes, journal = run({"a": {"x": "no room"}, "b": {"z": None}})
    assert outcomes["a"].error is None and len(outcomes["a"].reports["x"]) == 2
    assert outcomes["a"].is_alone and not outcomes["b"].is_alone
    assert len(outcomes["b"].reports["z"]) == 2
    assert journal.index("b:z") < journal.index("a:x", 1)


@pytest.mark.parametrize("behaviour, reason", [
    ("exit", "tests.benchmarks.training.programs ended with status 3"),
    ("die", "the process ended with status 7"),
])  # fmt: skip
def test_a_failure_is_told_and_the_others_go_on(run, behaviour, reason, capsys):
    outcomes, _ = run({"a": {"x": behaviour}, "b": {"z": None}})
    assert outcomes["a"].error == reason and outcomes["a"].reports["x"] == []
    assert len(outcomes["b"].reports["z"]) == 2
    assert reason in capsys.readouterr().out


def test_a_lack_of_memory_is_told(run):
    outcomes, _ = run({"a": {"x": "no room"}})
    assert outcomes["a"].error == "OutOfMemoryError: tried to allocate 2 GiB"


def test_nothing_goes_on_after_the_deadline(run):
    begin = time.monotonic()
    outcomes, _ = run({"a": {"x": "hang"}, "b": {"z": None}}, seconds=3)
    assert outcomes["a"].error == TOO_LATE
    assert time.monotonic() - begin < 30


def test_nothing_begins_after_the_deadline(tmp_path):
    entry = Entry(Task("tests.benchmarks.training.programs", SIZE), ("x",))
    plan = Plan(warm_context(), 1, 1, time.monotonic())
    outcome = measure({"a": entry}, plan, tmp_path / "work")["a"]
    assert outcome.error == TOO_LATE and outcome.reports == {"x": []}
    assert not (tmp_path / "work").exists()
