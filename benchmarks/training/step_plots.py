"""Plots of the training step benchmark."""

from pathlib import Path
from typing import Any

from benchmarks.training.components import COMPONENTS

# From the ground up: what has to be, then what surrounds it.
STACK = ("products", "attention", *(part for part in reversed(COMPONENTS[:-1])
                                    if part not in ("products", "attention")), COMPONENTS[-1])

def plot_components(rows: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars of where the time of a step goes, one for each profiled model."""
    figure, axes = _figure()
    profiled = [row for row in rows if f"{COMPONENTS[0]}_ms" in row]
    labels = [f"{row['model']}\n{row['tflops']:.3g} TFLOP/s" for row in profiled]
    below = [0.0] * len(profiled)
    for part in STACK:
        times = [row[f"{part}_ms"] for row in profiled]
        axes.bar(labels, times, 0.6, bottom=below, label=part.replace("_", "-"))
        below = [low + time for low, time in zip(below, times, strict=True)]
    axes.set_ylabel("milliseconds of a step, profiled")
    figure.legend(loc="outside upper right", ncols=4)
    _save(figure, path)


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Measured steps beside those predicted from operations and bytes, by size."""
    figure, axes = _figure()
    timed = [row for row in rows if row["model"] == "glm"]
    labels = [row["size"].replace(", ", "\n") for row in timed]
    at = range(len(timed))
    axes.bar([x - 0.2 for x in at], [row["ms"] for row in timed], 0.4, label="measured")
    predicted = [row.get("predicted_ms", 0.0) for row in timed]
    axes.bar([x + 0.2 for x in at], predicted, 0.4, label="operations and bytes at measured rates")
    for x, row in zip(at, timed, strict=True):
        axes.annotate(f"{row['tflops']:.3g} TFLOP/s", (x - 0.2, row["ms"]), ha="center", fontsize=7)
    axes.set_xticks(list(at), labels)
    axes.set_ylabel("milliseconds of a step")
    figure.legend(loc="outside upper right", ncols=4)
    _save(figure, path)


def _figure():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(8, 5), layout="constrained")


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=150)
    plt.close(figure)
