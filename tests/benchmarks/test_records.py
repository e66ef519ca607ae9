"""A record says what was measured, where and from which source."""

import argparse
import datetime
import json
import subprocess
from importlib import metadata

import pytest
import torch

from benchmarks import records


def test_a_record_can_be_traced(tmp_path):
    rows = [{"backend": "sdpa", "ms": 1.5}, {"backend": "flex", "ms": 2.0}]
    path = records.write_record("attention", {"dtype": "bf16"}, rows, folder=tmp_path / "new")
    record = json.loads(path.read_text())
    assert path.name.startswith("attention-20") and path.suffix == ".json"
    assert record["rows"] == rows and record["settings"] == {"dtype": "bf16"}
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["hardware"]["cores"] >= 1 and record["hardware"]["cpu"]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(record["date"])
    assert age < datetime.timedelta(minutes=5)


def strictly(text: str) -> dict:
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_number_that_json_does_not_have_is_null(tmp_path):
    rows = [{"ms": float("nan"), "all": [1.0, float("-inf")]}]
    check = records.Check("speed", float("nan"), 1.0)
    path = records.write_record("x", {"bound": float("inf")}, rows, tmp_path, checks=[check])
    record = strictly(path.read_text())
    assert record["rows"] == [{"ms": None, "all": [1.0, None]}]
    assert record["settings"] == {"bound": None}
    assert record["checks"][0]["value"] is None and not record["checks"][0]["passed"]


def test_every_record_is_json():
    for path in records.RESULTS.rglob("*.json"):
        strictly(path.read_text())


def test_the_revision_tells_changed_source(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            cwd=tmp_path, check=True, capture_output=True,
        )

    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.git_revision() == "unknown"
    monkeypatch.setenv("GIT_REVISION", "abc")
    assert records.git_revision() == "abc"
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "a")
    clean = records.git_revision()
    assert len(clean) == 40
    (tmp_path / "file").write_text("b")
    assert records.git_revision() == clean + "+changes"


def test_the_table_is_aligned(capsys):
    records.print_table([{"name": "a", "ms": 1.23456}, {"name": "longer", "ms": 10.0}])
    assert capsys.readouterr().out == (
        "| name   | ms    |\n| ------ | ----- |\n| a      | 1.235 |\n| longer | 10    |\n"
    )


def test_a_row_may_lack_a_column(capsys):
    records.print_table([{"ms": 1.0}, {"error": "out of memory"}])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1  |               |", "|    | out of memory |"
    ]


def flags(folder, *more):
    parser = argparse.ArgumentParser()
    records.add_run_flags(parser)
    parser.add_argument("--sizes", type=int, default=3)
    return parser.parse_args(["--results", str(folder), *more])


def test_a_run_that_breaks_off_leaves_what_it_has_measured(tmp_path):
    def rows():
        yield {"size": 1, "ms": 2.0}
        yield {"size": 2, "error": "OutOfMemoryError: too large"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.run_benchmark("some", flags(tmp_path), rows())
    (path,) = tmp_path.glob("some-*.json")
    record = json.loads(path.read_text())
    assert [row["size"] for row in record["rows"]] == [1, 2]
    assert record["rows"][1]["error"].startswith("OutOfMemoryError")
    assert record["settings"] == {"sizes": 3}


def test_required_figures_are_checked_and_failed_rows_are_not_drawn(tmp_path, capsys):
    drawn = []

    def judge(rows):
        speeds = [row["speed"] for row in rows if "speed" in row]
        return [
            records.Check("speed", max(speeds), 1.5),
            records.Check("memory", 0.6, 0.55, is_floor=False),
            records.Check("other", None, 1.0, why="no room"),
        ]

    path = records.run_benchmark(
        "some", flags(tmp_path, "--plot"), [{"speed": 2.0}, {"error": "ValueError: no"}],
        plot=lambda rows, path: drawn.append((rows, path.suffix)), judge=judge,
    )
    assert drawn == [([{"speed": 2.0}], ".png")]
    assert [check["passed"] for check in json.loads(path.read_text())["checks"]] == [
        True, False, None,
    ]
    lines = capsys.readouterr().out.splitlines()
    assert "PASS speed: 2 >= 1.5 required" in lines
    assert "FAIL memory: 0.6 <= 0.55 required" in lines
    assert "NOT MEASURED other, >= 1 required: no room" in lines


def test_nothing_is_drawn_where_all_failed(tmp_path):
    def plot(rows, path):
        raise AssertionError("nothing to draw")

    records.run_benchmark("some", flags(tmp_path, "--plot"), [{"error": "no"}], plot=plot)


def test_a_record_is_whole_at_any_moment(tmp_path, monkeypatch):
    path = records.write_record("some", {}, [{"ms": 1}], tmp_path)
    before = path.read_text()

    def killed(self, text):
        with self.open("w") as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(records.Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        records.write_record("some", {}, [{"ms": 1}, {"ms": 2}], tmp_path, path=path)
    assert path.read_text() == before


def test_a_reason_is_one_line():
    assert records.reason(ValueError("first\nsecond")) == "ValueError: first"
    error = torch.OutOfMemoryError("No memory. GPU 0 has 79 GiB of which 1 is free. Try more")
    assert records.reason(error) == "OutOfMemoryError: No memory. GPU 0 has 79 GiB"
