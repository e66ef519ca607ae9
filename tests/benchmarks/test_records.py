"""A record says what was measured, where and from which source."""

import datetime
import json
import subprocess
from importlib import metadata

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


def test_the_revision_tells_changed_source(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            cwd=tmp_path, check=True, capture_output=True,
        )

    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.git_revision() == "unknown"
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
