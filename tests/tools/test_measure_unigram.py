"""tools/measure_unigram.py measures a unigram model on the targets that a run is measured on."""

import math
from collections import Counter

import numpy as np
import pytest

from tools import measure_unigram


def test_targets_are_counted_by_the_objective_of_their_sample():
    sequence = {
        "labels": np.array([1, 2, 2, 3, 3, 3, 0, 0]),
        "loss_mask": np.array([0, 1, 1, 1, 1, 0, 0, 0], np.float32),
        # Two samples of [MASK], one of [gMASK], padding, unused rows.
        "sample_ends": np.array([2, 3, 6, 8, 8]),
        "objectives": np.array([0, 0, 1, -1, -1]),
    }
    counts = measure_unigram.count_targets([sequence, sequence], vocab_size=5)
    assert {index: count.tolist() for index, count in counts.items()} == {
        0: [0, 0, 4, 0, 0],
        1: [0, 0, 0, 4, 0],
    }


def test_the_loss_is_that_of_a_naive_model_smoothed_by_one():
    rng = np.random.default_rng(0)
    train, held_out = rng.integers(0, 20, 500), rng.integers(0, 30, 200)
    counts = Counter(train.tolist())
    losses = [-math.log((counts[token] + 1) / (500 + 30)) for token in held_out.tolist()]
    measured = measure_unigram.unigram_loss(
        np.bincount(train, minlength=30), np.bincount(held_out, minlength=30)
    )
    assert measured == pytest.approx(sum(losses) / len(losses), abs=1e-12)
