"""Log lines are read as Megatron 0.19 writes them."""

import math

import pytest

from megatron_glm.errors import GLMError
from megatron_glm.training.log_lines import LogLine, read_baseline, read_line, read_losses

TRAIN = (
    " [2026-01-02 03:04:05.678901] iteration       20/     300 | consumed samples:          320 | "
    "elapsed time per iteration (ms): 412.5 | learning rate: 1.000000E-03 | "
    "global batch size:    16 | lm loss: 6.500000E+00 | lm loss [MASK]: 6.250000E+00 | "
    "lm loss [gMASK]: 6.750000E+00 | loss scale: 1.0 | grad norm: 1.234 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |"
)
VALID = (
    " validation loss at iteration 20 | lm loss value: 6.100000E+00 | lm loss PPL: 4.45E+02 | "
    "lm loss [MASK] value: nan | lm loss [MASK] PPL: nan | "
    "lm loss [gMASK] value: 6.200000E+00 | lm loss [gMASK] PPL: 4.9E+02 | "
)


def test_a_training_line():
    losses = {"": 6.5, "[MASK]": 6.25, "[gMASK]": 6.75}
    assert read_line(TRAIN) == LogLine(20, False, losses, 300, 412.5, 16, 1.0, 1.234, 0)


def test_a_held_out_line():
    report = read_line(VALID)
    assert (report.iteration, report.is_valid) == (20, True)
    assert report.losses[""] == 6.1 and report.losses["[gMASK]"] == 6.2
    assert math.isnan(report.losses["[MASK]"])


def test_the_last_evaluation_counts_as_held_out():
    assert read_line(VALID.replace("20", "20 on validation set")).is_valid


def test_the_test_set_is_not_the_held_out_one():
    assert read_line(VALID.replace("at iteration 20", "at iteration 20 on test set")) is None


def test_other_lines_are_nothing():
    assert read_line("setting number of layers to 4") is None


def test_a_run_that_went_back_replaces_what_it_had_done():
    def line(iteration, loss):
        return f" iteration {iteration}/ 9 | lm loss: {loss:.6E} | loss scale: 1.0 |"

    log = [line(1, 5), line(2, 4), line(3, 3), " validation loss at iteration 3 | lm loss value:"
           " 3.5 | ", "restarted", line(2, 4.5)]
    train, valid = read_losses(log)
    assert train == {"": {1: 5.0, 2: 4.5}}
    assert valid == {"": {}}


def test_a_baseline_is_losses_by_objective(tmp_path):
    path = tmp_path / "baseline.json"
    path.write_text('{"[MASK]": 6.5}')
    assert read_baseline(path) == {"[MASK]": 6.5}
    # The last is a log, given in its place.
    for text in ("{}", "[]", "[6.5]", '{"[MASK]": "6.5"}', "{}{}", TRAIN):
        path.write_text(text)
        with pytest.raises(GLMError, match="^--baseline .*json: .*give what tools/measure_unigram"):
            read_baseline(path)
