"""The training step benchmark measures every model and leaves a record."""

import json

import pytest

from benchmarks import train_step
from benchmarks.training.rounds import Outcome
from benchmarks.training.work import product_flops
from tests.ranks import warm_context


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Record, folder and output of one run."""
    folder = tmp_path_factory.mktemp("results")
    train_step.main([
        "--preset", "tiny", "--rounds", "2", "--steps", "1", "--plot", "--results", str(folder),
        "--glm-flags", "--min-gmask-ratio 0.3 --glm-attention-backend chunked",
    ], warm_context())  # fmt: skip
    (path,) = folder.glob("train_step-*.json")
    return json.loads(path.read_text()), path


def test_every_model_is_measured(run):
    record, path = run
    rows = {row["model"]: row for row in record["rows"]}
    assert [row.get("error") for row in record["rows"]] == [None] * 8
    assert list(rows) == [
        "products", "attention", "copy", "glm", "causal", "llama", "stock", "llama-causal"
    ]  # fmt: skip
    assert all(row["ms"] > 0 for row in record["rows"])
    for model in ("glm", "llama", "stock"):
        row = rows[model]
        assert sum(row[f"{part}_ms"] for part in ("products", "attention", "element_wise")) > 0
        assert row["optimizer_ms"] > 0 and len(row["round_ms"]) == 2
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_models_are_of_the_same_size(run):
    parameters = {row["model"]: row.get("parameters") for row in run[0]["rows"]}
    # They differ by biases and norms.
    for model in ("glm", "causal", "stock"):
        assert parameters[model] == pytest.approx(parameters["llama"], rel=0.03)


def test_speeds_follow_from_times_and_masks(run):
    (size,) = train_step.PRESETS["tiny"].sizes
    rows = {row["model"]: row for row in run[0]["rows"]}
    causal = (size.seq_length + 1) / (2 * size.seq_length)
    for model in ("causal", "llama", "llama-causal", "stock"):
        assert rows[model]["of_square_mask"] == pytest.approx(causal)
    assert rows["glm"]["of_square_mask"] != pytest.approx(causal, rel=1e-4)
    ceiling = product_flops(size) / rows["products"]["ms"] / 1e9
    assert rows["products"]["tflops"] == pytest.approx(ceiling)
    assert rows["stock"]["of_products"] == pytest.approx(rows["stock"]["tflops"] / ceiling)
    tokens = size.num_tokens / rows["llama"]["ms"] * 1e3
    assert rows["llama"]["tokens_per_s"] == pytest.approx(tokens)


def test_what_was_measured_before_a_failure_is_kept(tmp_path, monkeypatch):
    report = {"seconds": 0.5, "parameters": 7, "device": "cpu"}

    def measure(entries, plan, folder):
        return {
            name: Outcome({variant: [] for variant in entry.variants}, error="OutOfMemoryError: 2")
            if name == "stock"
            else Outcome({variant: [report] for variant in entry.variants}, error="no answer")
            for name, entry in entries.items()
        }

    monkeypatch.setattr(train_step, "measure", measure)
    train_step.main(["--preset", "tiny", "--models", "glm", "stock", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    glm, causal, stock = json.loads(path.read_text())["rows"]
    assert glm["ended_early"] == causal["ended_early"] == "no answer"
    assert glm["ms"] == causal["ms"] == 500
    assert stock["error"] == "OutOfMemoryError: 2" and "ms" not in stock


def row(model, tflops, **more):
    return {"model": model, "tflops": tflops, **more}


def test_required_figures():
    rows = [
        row("glm", 630.0, tokens_per_s=40e3, peak_gib=50.0), row("causal", 640.0),
        row("llama", 510.0, tokens_per_s=32e3),
        row("stock", 278.0, tokens_per_s=16e3, peak_gib=94.0),
    ]  # fmt: skip
    checks = train_step.judge(rows, "4096")
    assert [check.passed for check in checks] == [True] * 7
    assert [round(check.value, 3) for check in checks] == [
        630, 1.235, 2.266, 1.25, 2.5, 1.016, 0.532
    ]  # fmt: skip
    slower = [row("glm", 590.0, tokens_per_s=36e3, peak_gib=60.0), *rows[1:]]
    assert [check.passed for check in train_step.judge(slower, "4096")] == [
        False, True, True, False, True, False, False
    ]  # fmt: skip
    failed = [*rows[:3], {"model": "stock", "error": "OutOfMemoryError"}]
    assert [check.passed for check in train_step.judge(failed, "4096")] == [
        True, True, False, True, False, True, False
    ]  # fmt: skip
    assert train_step.judge([row("glm", 600.0, of_products=0.86)], "12288")[0].passed
    assert not train_step.judge([row("glm", 600.0), row("glm-fp16", 580.0)], "fp16")[0].passed


def test_sizes_and_models_are_plotted(tmp_path):
    sizes = train_step.PRESETS["scaling"].sizes
    rows = [
        {"size": str(size), "model": model, "ms": 5.0, "tflops": 600.0, "predicted_ms": 4.0}
        for size in sizes for model in ("glm", "causal")
    ]  # fmt: skip
    path = tmp_path / "scaling.png"
    train_step.plot_scaling(rows, path)
    assert path.stat().st_size > 1000
    assert len({size.num_tokens for size in sizes}) == 1
