"""The decode benchmark counts what a step reads and leaves a record."""

import json

import pytest

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
    assert all(row["speed_of_bf16"] == 1 for row in rows if row["form"] == "bf16")
    assert record["settings"]["hidden_size"] == 64
    assert path.with_suffix(".png").stat().st_size > 1000
    assert capsys.readouterr().out.count("| int4") == 2
