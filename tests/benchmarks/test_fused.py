"""The benchmark of fused kernels runs both ways of an operation and leaves a record."""

import json

import pytest
import torch

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
    monkeypatch.setattr(fused, "milliseconds", lambda *_: 2.0)
    leaf = torch.ones(1000, requires_grad=True)
    operation = fused.Operation(None, lambda x: 2 * x, [leaf], 1000, forward=3, backward=5)
    row = fused.measure(operation, "torch", torch.device("cpu"), repeats=1)
    # 8 passes of 4000 bytes in 2 ms.
    assert row["gb_per_s"] == pytest.approx(8 * 4000 / 2e-3 / 1e9)


def test_kernels_are_refused_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        fused.main(["--device", "cpu", "--variants", "fused"])
    assert "--device cpu: only --variants torch runs without a GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("name", fused.OPERATIONS)
def test_on_a_gpu_every_variant_is_measured(name):
    device = torch.device("cuda")

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_()

    for variant in fused.VARIANTS:
        operation = fused.OPERATIONS[name](fused.SIZES["small"], draw, 0.1)
        assert fused.measure(operation, variant, device, repeats=1)["ms"] > 0
