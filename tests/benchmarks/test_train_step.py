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


def judge(rows, *flags):
    return train_step.judge(rows, train_step.parse(flags))


def test_required_figures():
    rows = [
        row("glm", 630.0, tokens_per_s=40e3), row("causal", 640.0),
        row("llama", 510.0, tokens_per_s=32e3), row("stock", 278.0, tokens_per_s=16e3),
    ]  # fmt: skip
    checks = judge(rows, "--preset", "4096")
    assert [check.passed for check in checks] == [True] * 6
    assert [round(check.value, 3) for check in checks] == [630, 1.235, 2.266, 1.25, 2.5, 1.016]
    slower = [row("glm", 590.0, tokens_per_s=36e3), *rows[1:]]
    assert [check.passed for check in judge(slower, "--preset", "4096")] == [
        False, True, True, False, True, False
    ]  # fmt: skip
    (of_products,) = judge([row("glm", 600.0, of_products=0.86)], "--preset", "12288")
    (of_bf16,) = judge([row("glm", 600.0), row("glm-fp16", 580.0)], "--preset", "fp16")
    assert of_products.passed and not of_bf16.passed


def test_what_does_not_fit_is_not_judged_and_says_why():
    error = "OutOfMemoryError: GPU 0 has a total capacity of 79.18 GiB"
    rows = [row("glm", 630.0, peak_gib=57.0), {"model": "stock", "error": error}]
    checks = judge(rows, "--preset", "4096")
    assert [check.passed for check in checks] == [True, None, None, None, None, None]
    assert checks[1].why == "llama: not reached"
    memory, lean = judge(rows, "--preset", "memory")
    assert memory.passed is None and lean.why == "glm-lean: not reached"
    assert str(memory).endswith(f"stock: {error}; run it on an H200 or with --micro-batch-size 2")
    (of_products,) = judge(
        [{"model": "products", "error": "RuntimeError: no"}, row("glm", 600.0)], "--preset", "12288"
    )
    assert of_products.passed is None and of_products.why == "products: RuntimeError: no"


def test_a_smaller_micro_batch_has_as_many_tokens_and_is_not_judged():
    flags = ["--preset", "memory", "--micro-batch-size", "2"]
    arguments = train_step.parse(flags)
    (size,), (whole,) = train_step.sizes(arguments), train_step.PRESETS["memory"].sizes
    assert size.micro_batch_size == 2 and size.num_tokens == whole.num_tokens
    assert arguments.dropout == 0.1 and train_step.parse(["--dropout", "0"]).dropout == 0.0
    rows = [row("glm", 1.0, peak_gib=50.0), row("stock", 1.0, peak_gib=100.0)]
    assert judge(rows, *flags) == []
    with pytest.raises(SystemExit):
        train_step.parse(["--micro-batch-size", "3"])


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
