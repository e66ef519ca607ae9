"""tools/show_progress.py keeps the whole log and shows what a person wants to know of it."""

import subprocess
import sys
from pathlib import Path

from tools import show_progress

TOOL = Path(show_progress.__file__)
STEP = (
    " iteration 20/ 50 | elapsed time per iteration (ms): 2000.0 | global batch size: 16 |"
    " lm loss: 6.5 | lm loss [MASK]: 6.25 | lm loss [gMASK]: 6.75 | loss scale: 1.0 |\n"
)
VALID = " validation loss at iteration 20 | lm loss value: 6.0 | lm loss [MASK] value: 5.5 |\n"
SAVED = "  successfully saved checkpoint from iteration      20 to /tmp/checkpoint\n"


def test_a_step_shows_losses_speed_and_time_left():
    head, row = show_progress.show([STEP], seq_length=256)
    assert head.split() == ["step", "[MASK]", "[gMASK]", "tokens/s", "left"]
    assert row.split() == ["20/50", "6.250", "6.750", "2,048", "1:00"]


def test_heads_and_news_are_shown_once_and_noise_not_at_all():
    lines = list(show_progress.show(["noise\n", STEP, STEP, VALID, SAVED, SAVED], seq_length=256))
    assert len(lines) == 5
    assert "[MASK] 5.500" in lines[3] and lines[4].strip() == "saved after step 20"


def test_the_single_step_that_a_resumed_run_reports_first_is_left_out():
    loaded = "  successfully loaded checkpoint from /tmp/c [ t 1/1, p 1/1 ] at iteration 20\n"
    first, later = STEP.replace("20/", "21/"), STEP.replace("20/", "30/")
    lines = list(show_progress.show([loaded, first, later], seq_length=256))
    assert lines[0].strip() == "resumed after step 20"
    assert [line.split()[0] for line in lines[1:]] == ["step", "30/50"]


def test_an_error_of_the_run_is_shown():
    error = "[rank0]: pretrain_glm.py: error: --lr: too small\n"
    assert list(show_progress.show([error], 256)) == ["  pretrain_glm.py: error: --lr: too small"]


def test_the_last_line_of_a_traceback_is_shown_and_not_torchruns():
    lines = ["[rank0]: RuntimeError: no room\n", "ValueError: 3\n", "a.b.ChildFailedError: \n"]
    assert list(show_progress.show(lines, 256)) == ["  RuntimeError: no room", "  ValueError: 3"]


def test_every_line_is_appended_to_the_log(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("before\n")
    command = [sys.executable, TOOL, "--log", log, "--seq-length", "256"]
    subprocess.run(command, input=f"noise\n{STEP}", text=True, check=True, timeout=60)
    assert log.read_text() == f"before\nnoise\n{STEP}"
