"""The loss and its parts, against a loop over tokens."""

import math

import pytest
import torch

from megatron_glm.training.batch import SAMPLE_KEYS, TOKEN_KEYS, unpack_columns
from megatron_glm.training.loss import LossParts, token_loss
from tests.operations import Operations

VOCABULARY = 1000


def make_batch(objectives, sources, ends):
    rows, width = len(objectives), ends[0][-1]
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(2, (rows, width), generator=generator)
    columns = {key: torch.zeros(rows, width, dtype=torch.int64) for key in TOKEN_KEYS}
    columns["loss_mask"] = mask
    samples = dict(zip(SAMPLE_KEYS, map(torch.tensor, (objectives, ends, objectives, sources)),
                       strict=True))
    packed = torch.cat([*columns.values(), *samples.values()], dim=1)
    losses = torch.rand(rows, width, generator=generator)
    batch = unpack_columns(packed, seq_length=width, num_samples=len(ends[0]),
                           num_targets=int(mask.sum()), num_places=len(ends[0]))
    return batch, losses


def parts(*sources):
    sources = dict(enumerate(sources))
    return LossParts({0: "[MASK]", 1: "[gMASK]"}, sources, sources, VOCABULARY)


def ratio(pair):
    return (pair[0] / pair[1]).item()


def test_parts_equal_a_loop_over_tokens():
    batch, losses = make_batch([[0, 1, -1], [1, 0, 0]], [[0, 1, -1], [1, 1, 0]],
                               [[4, 7, 10], [2, 6, 10]])
    report = parts("wiki", "books")(losses, batch, training=True)
    expected = {}
    for row in range(2):
        start = 0
        for column, end in enumerate(batch.sample_ends[row].tolist()):
            for token in range(start, end):
                names = ["lm loss"]
                names += [f"lm loss {n}" for i, n in enumerate(("[MASK]", "[gMASK]"))
                          if i == batch.objectives[row, column]]
                names += [f"lm loss {n}" for i, n in enumerate(("wiki", "books"))
                          if i == batch.sources[row, column]]
                for name in names:
                    pair = expected.setdefault(name, [0.0, 0])
                    pair[0] += (losses * batch.loss_mask)[row, token].item()
                    pair[1] += batch.loss_mask[row, token].item()
            start = end
    assert report.keys() == expected.keys()
    for name, (total, count) in expected.items():
        assert report[name].tolist() == pytest.approx([total, count], rel=1e-6), name
    total, count = token_loss(losses, batch)
    assert total.item() == pytest.approx(expected["lm loss"][0])
    assert count.dtype == torch.int32 and count.item() == expected["lm loss"][1]


def test_an_absent_objective_repeats_its_last_value_and_never_reads_nan():
    present, losses = make_batch([[0, 1]], [[0, 0]], [[6, 12]])
    absent, other = make_batch([[0, 0]], [[0, 0]], [[6, 12]])
    report = parts()
    assert ratio(report(other, absent, True)["lm loss [gMASK]"]) == pytest.approx(
        math.log(VOCABULARY)
    )
    seen = ratio(report(losses, present, True)["lm loss [gMASK]"])
    assert ratio(report(other, absent, True)["lm loss [gMASK]"]) == pytest.approx(seen)


def test_evaluation_says_that_there_was_nothing():
    absent, losses = make_batch([[0, 0]], [[0, 0]], [[6, 12]])
    assert math.isnan(ratio(parts()(losses, absent, training=False)["lm loss [gMASK]"]))


def test_a_single_source_is_not_reported_twice():
    batch, losses = make_batch([[0, 1]], [[0, 0]], [[6, 12]])
    assert set(parts("only")(losses, batch, True)) == {
        "lm loss", "lm loss [MASK]", "lm loss [gMASK]"
    }


def test_sources_are_those_of_the_phase():
    """A corpus that only validation reads would otherwise show a uniform guess all the run long."""
    batch, losses = make_batch([[0, 1]], [[0, 1]], [[6, 12]])
    report = LossParts({}, {0: "train"}, {0: "train", 1: "held-out"}, VOCABULARY)
    assert set(report(losses, batch, True)) == {"lm loss"}
    assert set(report(losses, batch, False)) == {"lm loss", "lm loss train", "lm loss held-out"}


def test_more_sources_take_no_more_operations():
    batch, losses = make_batch([[0, 1]], [[0, 1]], [[6, 12]])
    totals = set()
    for num_sources in (2, 20):
        report = parts(*(f"source {number}" for number in range(num_sources)))
        report(losses, batch, True)
        with Operations() as operations:
            report(losses, batch, True)
        totals.add(operations.counts.total())
    (total,) = totals
    assert total <= 30
