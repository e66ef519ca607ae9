"""The attention benchmark counts the mask's work and leaves a record."""

import json

import pytest
import torch

from benchmarks import attention
from megatron_glm.model.attention.bounds import dense_mask, validate_samples


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("packing", [1, 3, 4])
def test_work_is_what_the_mask_leaves(packing, share):
    samples = attention.uniform_samples(2, 50, packing, share)
    validate_samples(samples, 50)
    assert attention.visible_pairs(samples) == dense_mask(samples, 50).sum()


def test_operations_of_a_pair():
    # Scores and output forward; again scores, and the gradients of probabilities, query, key and
    # value backward: 7 products of 2 * d operations.
    assert attention.forward_backward_flops(pairs=10, heads=3, dim=8) == 10 * 3 * 7 * 2 * 8


def test_the_yardstick_is_causal_attention():
    samples = attention.uniform_samples(2, 20, 1, 0.0)
    mixed = torch.randn(20, 2, 3, 24, dtype=torch.float64)
    query, key, value = mixed.split(8, dim=-1)
    scores = torch.einsum("ibnd,jbnd->bnij", query, key) * 0.3
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), value).flatten(2)
    actual = attention.causal_attention(query, key, value, samples, softmax_scale=0.3)
    torch.testing.assert_close(actual, expected)


def test_a_run_prints_a_table_and_leaves_a_record_and_a_plot(tmp_path, capsys):
    attention.main([
        "--device", "cpu", "--shapes", "1x2x64x16", "--share", "0.5", "--packing", "1", "2",
        "--backends", "sdpa", "chunked", "--dropout", "0.1", "--repeats", "1", "--plot",
        "--results", str(tmp_path),
    ])
    (path,) = tmp_path.glob("attention-*.json")
    record = json.loads(path.read_text())
    measured = [(row["backend"], row["packing"]) for row in record["rows"]]
    assert measured == [
        ("causal", 1), ("sdpa", 1), ("chunked", 1), ("sdpa", 2), ("chunked", 2)
    ]
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in record["rows"])
    assert record["settings"]["dropout"] == 0.1
    assert path.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.count("| chunked") == 2
