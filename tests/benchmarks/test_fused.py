"""The benchmark of fused kernels runs both ways of an operation and leaves a record."""

import json

import pytest

pytest.importorskip("triton")
from benchmarks import fused  # noqa: E402


def test_a_run_leaves_a_record(tmp_path, capsys):
    fused.main(["--device", "cpu", "--repeats", "1", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("fused-*.json")
    copy, *rows = json.loads(path.read_text())["rows"]
    assert copy["gb_per_s"] > 0
    assert [row["operation"] for row in rows] == list(fused.OPERATIONS)
    for row in rows:
        assert row["ms"] > 0 and row["of_copy"] == pytest.approx(row["gb_per_s"] / copy["gb_per_s"])
    assert capsys.readouterr().out.count("| small |") == len(rows)


def test_speed_is_counted_in_passes_over_memory(monkeypatch):
    monkeypatch.setattr(fused, "timed", lambda *_, **of: 2.0)
    monkeypatch.setattr(fused, "copy_gb_per_s", lambda *_: 1.0)
    flags = ["--device", "cpu", "--operations", "bias_geglu", "rotate_query_key_"]
    _, geglu, rotary = fused.run(fused.parse(flags))
    # 8 and 12 passes of 256 tokens of 352 and 128 fp32 in 2 ms.
    assert geglu["gb_per_s"] == pytest.approx(8 * 256 * 352 * 4 / 2e-3 / 1e9)
    assert rotary["gb_per_s"] == pytest.approx(12 * 256 * 128 * 4 / 2e-3 / 1e9)


def test_passes_of_every_operation_are_counted():
    assert fused.PASSES.keys() == fused.OPERATIONS.keys()


def test_kernels_are_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        fused.main(["--device", "cpu", "--variants", "fused"])
    assert "--device cpu: only --variants torch runs without a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_every_variant_is_measured():
    flags = ["--device", "cuda", "--sizes", "small", "--repeats", "1"]
    _, *rows = fused.run(fused.parse(flags))
    assert len(rows) == len(fused.OPERATIONS) * len(fused.VARIANTS)
    assert all(row["ms"] > 0 for row in rows)
