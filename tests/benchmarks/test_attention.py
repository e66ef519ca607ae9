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
        "--backends", "sdpa", "chunked", "--dropout", "0", "0.1", "--repeats", "1", "--plot",
        "--results", str(tmp_path),
    ])
    (path,) = tmp_path.glob("attention-*.json")
    record = json.loads(path.read_text())
    measured = [(row["backend"], row["dropout"], row["packing"]) for row in record["rows"]]
    assert measured == [
        (backend, dropout, packing)
        for dropout in (0, 0.1)
        for backend, packing in (
            ("causal", 1), ("sdpa", 1), ("chunked", 1), ("sdpa", 2), ("chunked", 2)
        )
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in record["rows"])
    assert all(row["compiled"] == 0 and row["of_causal"] > 0 for row in record["rows"])
    assert path.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.count("| chunked") == 4


def test_a_case_without_room_is_a_row_with_the_reason(tmp_path, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("tried to allocate 64 GiB")

    monkeypatch.setattr(attention, "measure", no_room)
    attention.main(["--device", "cpu", "--shapes", "1x2x64x16", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("attention-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["error"] for row in rows} == {"OutOfMemoryError: tried to allocate 64 GiB"}


def test_the_dense_reference_is_spared_long_sequences():
    arguments = attention.parse(["--device", "cpu"])
    for length, expected in ((4096, True), (8192, False)):
        names = {name for name, *_ in attention.cases(arguments, (1, 2, length, 16))}
        assert ("reference" in names) == expected and "sdpa" in names


def test_compilations_are_counted():
    with attention.Compilations() as compilations:
        attention.dynamo_counters["stats"]["unique_graphs"] += 2
        attention.knobs.compilation.listener(src=None, metadata={}, times=None, cache_hit=True)
    assert compilations.count == 3
    assert attention.knobs.compilation.listener is None


def test_required_figures():
    def row(shape, backend, packing, share, of_causal, compiled=0):
        return {"shape": shape, "dropout": 0.0, "packing": packing, "share": share,
                "backend": backend, "of_causal": of_causal, "compiled": compiled}  # fmt: skip

    first, second = attention.REQUIRED_SHAPES
    rows = [
        row(first, "flex", 1, 0.5, 0.96, compiled=1), row(first, "flex", 4, 0.5, 0.5),
        row(first, "triton", 1, 0.5, 0.9), row(second, "flex", 1, 0.5, 0.94, compiled=1),
        row(second, "triton", 1, 0.5, None),
    ]  # fmt: skip
    assert [check.passed for check in attention.judge(rows)] == [True, False, True]
    again = [*rows, row(first, "flex", 4, 1.0, 0.9, compiled=1)]
    assert [check.passed for check in attention.judge(again)] == [True, False, False]
