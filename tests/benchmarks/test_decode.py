"""The decode benchmark counts what a step reads and leaves a record."""

import json

import pytest
import torch

from benchmarks import decode

SIZES = [
    "--device", "cpu", "--num-layers", "2", "--hidden-size", "64", "--ffn-hidden-size", "128",
    "--num-attention-heads", "4", "--vocab-size", "256", "--context", "16", "--steps", "2",
]  # fmt: skip


@pytest.mark.parametrize("form, bytes_a_weight", [("fp16", 2), ("int8", 1), ("int4", 0.5)])
def test_bytes_of_a_step(form, bytes_a_weight):
    engine = decode.make_engine(decode.parse(SIZES), form)
    weights = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    # Plain embedding, keys and values of 2 layers.
    others = 256 * 64 * 2 + 2 * 2 * 3 * 10 * 64 * 2
    found = decode.bytes_of_a_step(engine, batch=3, length=10)
    scales = found - weights * bytes_a_weight - others
    # bf16 scales: one a row, and what the INT4 kernel has for its groups of 64 columns.
    assert 0 <= scales <= 0.1 * weights
    assert (scales == 0) == (form == "fp16")


def test_a_run_prints_a_table_and_leaves_a_record_and_a_plot(tmp_path, capsys):
    more = ["--batches", "1", "2", "--rounds", "2", "--plot", "--results", str(tmp_path)]
    decode.main([*SIZES, *more])
    (path,) = tmp_path.glob("decode-*.json")
    record = json.loads(path.read_text())
    rows = record["rows"]
    assert [(row["batch"], row["form"]) for row in rows] == [
        (batch, form) for batch in (1, 2) for form in ("bf16", "int8", "int4")
    ]
    assert all(0 < row["step_ms"] < 1e6 and 0 < row["prefill_ms"] < 1e6 for row in rows)
    products = 2 * 2 * (4 * 64 * 64 + 3 * 64 * 128)
    for row in rows:
        flops = products * row["batch"] * 16
        assert row["prefill_tflops"] == pytest.approx(flops / row["prefill_ms"] / 1e9)
    assert all(row["speed_of_bf16"] == 1 for row in rows if row["form"] == "bf16")
    assert record["settings"]["hidden_size"] == 64
    assert path.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.count("| int4") == 2


def test_a_form_without_room_is_a_row_with_the_reason_and_the_others_go_on(tmp_path, monkeypatch):
    make_engine = decode.make_engine

    def make_engine_or_fail(arguments, form):
        if form == "bf16":
            raise torch.OutOfMemoryError("tried to allocate 64 GiB")
        return make_engine(arguments, form)

    take = decode.Measurement.take

    def take_or_fail(self, has_prefill):
        if self.batch == 2 and self.engine.num_weight_bytes < 100_000:
            raise torch.OutOfMemoryError("the cache")
        take(self, has_prefill)

    monkeypatch.setattr(decode, "make_engine", make_engine_or_fail)
    monkeypatch.setattr(decode.Measurement, "take", take_or_fail)
    more = ["--batches", "1", "2", "--rounds", "1", "--plot", "--results", str(tmp_path)]
    decode.main([*SIZES, *more])
    (path,) = tmp_path.glob("decode-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["form"], row.get("error")) for row in rows] == [
        (1, "bf16", "OutOfMemoryError: tried to allocate 64 GiB"), (1, "int8", None),
        (1, "int4", None), (2, "bf16", "OutOfMemoryError: tried to allocate 64 GiB"),
        (2, "int8", None), (2, "int4", "OutOfMemoryError: the cache"),
    ]  # fmt: skip
    assert not any("speed_of_bf16" in row for row in rows)
