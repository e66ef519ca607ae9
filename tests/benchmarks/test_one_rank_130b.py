"""One rank of a job that only pretends to have others is measured stage by stage."""

import json

import pytest

from benchmarks import one_rank_130b
from benchmarks.training.job import LAYOUTS
from megatron_glm.planning.parameters import parameters_of_rank
from tests.ranks import warm_context


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Record and its file."""
    folder = tmp_path_factory.mktemp("results")
    one_rank_130b.main([
        "--preset", "tiny", "--rounds", "1", "--peak-tflops", "0.1", "--plot",
        "--results", str(folder),
    ], warm_context())  # fmt: skip
    (path,) = folder.glob("one_rank_130b-*.json")
    return json.loads(path.read_text()), path


def test_each_stage_and_the_whole_job_are_measured(run):
    record, path = run
    *stages, whole = record["rows"]
    assert [row.get("error") for row in record["rows"]] == [None] * 4
    assert [row["stage"] for row in record["rows"]] == [0, 1, 2, "whole job"]
    assert all(row["micro_batch_ms"] > 0 and row["optimizer_ms"] > 0 for row in stages)
    assert all("skipped_steps" not in row for row in stages)
    assert 0 < whole["mfu"] < max(row["mfu"] for row in stages)
    assert path.with_suffix(".png").stat().st_size > 1000


def test_a_rank_holds_what_the_plan_says(run):
    layout = LAYOUTS["tiny"]
    arguments = one_rank_130b.parse(["--peak-tflops", "1"])
    job = one_rank_130b.planned_job(layout, arguments)
    for row in run[0]["rows"][:-1]:
        assert row["parameters"] == parameters_of_rank(job, row["stage"])
        assert row["layers"] == layout.num_layers(row["stage"])


def test_required_figures():
    rows = [
        {"stage": 0, "mfu": 0.61, "of_forecast": 0.97}, {"stage": 4, "mfu": 0.64},
        {"stage": 7, "mfu": 0.6, "of_forecast": 1.06}, {"stage": "whole job", "mfu": 0.58},
    ]  # fmt: skip
    checks = one_rank_130b.judge(rows, "130b")
    assert [check.passed for check in checks] == [True, False, False]
    assert one_rank_130b.judge(rows[:1], "130b")[0].value is None


def test_an_unknown_chip_needs_its_peak(capsys, monkeypatch):
    monkeypatch.setattr(one_rank_130b, "peak_tflops", lambda: None)
    with pytest.raises(SystemExit):
        one_rank_130b.parse([])
    assert "--peak-tflops" in capsys.readouterr().err
