"""A plan as a picture: memory of every stage by kind, and where the time of a step goes."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from megatron_glm.planning.memory import GIB  # noqa: E402
from megatron_glm.planning.plan import Plan  # noqa: E402
from megatron_glm.planning.report import (  # noqa: E402
    MEMORY_KINDS,
    headline,
    memory_kinds,
    time_kinds,
)

# State that stays in blues, what passes in warm colours, the rest grey.
MEMORY_COLORS = ("#08519c", "#3182bd", "#6baed6", "#fd8d3c", "#fdd0a2", "#bdbdbd")
WORK, WAIT = "#3182bd", "#e6550d"
WORKING = ("matrix products", "attention", "memory-bound", "optimizer")


def draw(plan: Plan, output: Path) -> None:
    """Writes the picture; the suffix of `output` chooses the format."""
    width = 5 + 0.35 * len(plan.memory)
    figure, (memory, time) = plt.subplots(
        1, 2, figsize=(width + 5, 4.8), width_ratios=(width, 5), layout="constrained"
    )
    _draw_memory(memory, plan)
    _draw_time(time, plan)
    title, *rest = headline(plan)
    figure.suptitle(f"{title}\n{rest[1].strip().removeprefix('step').strip()}", fontsize=10)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def _draw_memory(axes, plan: Plan) -> None:
    stages = [forecast.stage for forecast in plan.memory]
    sizes = [memory_kinds(forecast) for forecast in plan.memory]
    bottom = [0.0] * len(stages)
    for (kind, name), color in zip(MEMORY_KINDS.items(), MEMORY_COLORS, strict=True):
        heights = [size[kind] / GIB for size in sizes]
        axes.bar(stages, heights, bottom=bottom, color=color, label=name, width=0.8)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for stage, total in zip(stages, bottom, strict=True):
        axes.annotate(f"{total:.1f}", (stage, total), ha="center", va="bottom", fontsize=8)
    limit = plan.cluster.gpu.memory / GIB
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"{plan.cluster.gpu.name}: {limit:.1f} GiB", (0.01, limit), fontsize=8, va="bottom",
        xycoords=("axes fraction", "data"), xytext=(0, 1), textcoords="offset points",
    )  # fmt: skip
    axes.set_ylim(0, 1.3 * max(limit, *bottom))
    axes.set_xticks(stages)
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("memory of a rank, GiB")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles, labels, ncols=3, fontsize=8, frameon=False, loc="upper center")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_time(axes, plan: Plan) -> None:
    kinds = [item for item in time_kinds(plan).items() if item[1] > 0]
    kinds.sort(key=lambda item: item[1])
    names, seconds = zip(*kinds, strict=True)
    colors = [WORK if name in WORKING else WAIT for name in names]
    shares = [100 * value / plan.time.step for value in seconds]
    rows = range(len(names))
    axes.barh(rows, shares, color=colors)
    axes.set_yticks(rows, names)
    for row, share, value in zip(rows, shares, seconds, strict=True):
        axes.annotate(f" {share:.1f}% ({value:.2g} s)", (share, row), va="center", fontsize=8)
    axes.set_xlim(0, 1.35 * max(shares))
    axes.set_xlabel("share of a step, %; work blue, waiting orange")
    axes.spines[["top", "right"]].set_visible(False)
