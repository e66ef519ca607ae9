"""tools/plot_losses.py draws what the log reports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from tools import plot_losses

TOOL = Path(plot_losses.__file__)
LOG = [
    f" iteration {step}/ 30 | lm loss: {6 - step / 10} | lm loss [MASK]: {7 - step / 10} |"
    f" lm loss [gMASK]: {5 - step / 10} |\n"
    f" validation loss at iteration {step} | lm loss value: 3 |"
    f" lm loss [MASK] value: {8 - step / 10} | lm loss [gMASK] value: 2 |\n"
    for step in (10, 20, 30)
]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("some start-up noise\n" + "".join(LOG))
    return path


def test_each_objective_has_its_curves_and_its_level_line(monkeypatch, tmp_path):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    train = {"": {10: 5.0}, "[MASK]": {10: 6.0, 20: 5.0}, "[gMASK]": {10: 4.0}}
    train["some_source"] = {10: 5.0}
    plot_losses.draw(train, {"[MASK]": {20: 5.5}}, {"[MASK]": 6.5}, tmp_path / "plot.png")
    lines = {line.get_label(): line.get_xydata().tolist() for line in plt.gca().lines}
    assert lines == {
        "[MASK], training": [[10, 6.0], [20, 5.0]],
        "[MASK], held out": [[20, 5.5]],
        "[MASK], unigram model": [[0, 6.5], [1, 6.5]],
        "[gMASK], training": [[10, 4.0]],
    }


def test_the_single_step_after_a_resumption_is_no_point():
    curve = {1: 8.0, 10: 7.0, 20: 6.0, 21: 9.0, 30: 5.0, 40: 4.0}
    assert list(plot_losses.whole_reports(curve)) == [1, 10, 20, 30, 40]


def test_the_command_writes_a_picture(log, tmp_path):
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({"[MASK]": 6.0, "[gMASK]": 4.5}))
    output = tmp_path / "plot.png"
    command = [sys.executable, TOOL, log, "--output", output, "--baseline", baseline]
    subprocess.run(command, check=True, timeout=120)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_one_line(log, tmp_path, monkeypatch, capsys):
    output = tmp_path / "plot.xyz"
    monkeypatch.setattr(sys, "argv", ["plot_losses.py", str(log), "--output", str(output)])
    with pytest.raises(SystemExit) as stop:
        plot_losses.main()
    assert stop.value.code == 2 and f"--output {output}: must end in" in capsys.readouterr().err
    assert not output.exists()


def test_a_log_without_losses_is_an_error(tmp_path):
    log = tmp_path / "other.log"
    log.write_text("nothing here\n")
    command = [sys.executable, TOOL, log, "--output", tmp_path / "plot.png"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and str(log) in result.stderr
    assert not (tmp_path / "plot.png").exists()
