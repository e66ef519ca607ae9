"""Draw the losses of a run, by objective, from its log.

    python tools/plot_losses.py LOG --output losses.png [--baseline baseline.json]
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES  # noqa: E402
from megatron_glm.errors import GLMError, exit_with_one_line  # noqa: E402
from megatron_glm.pictures import check_picture  # noqa: E402
from megatron_glm.training.log_lines import read_baseline, read_losses  # noqa: E402


def draw(train: dict, valid: dict, baseline: dict[str, float], output: Path) -> None:
    """Write a picture of loss curves, of each objective that there is.

    train, valid: {objective: {iteration: nats per token}}. baseline: {objective: nats per token},
    drawn as a level line. output: its suffix chooses the format.
    """
    names = [name for name in OBJECTIVE_NAMES.values() if name in train]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, name in enumerate(names):
        color = f"C{index}"
        curve = whole_reports(train[name])
        axes.plot(*_points(curve), color=color, alpha=0.5, label=f"{name}, training")
        if valid.get(name):
            axes.plot(*_points(valid[name]), color=color, marker="o", label=f"{name}, held out")
        if name in baseline:
            axes.axhline(
                baseline[name], color=color, linestyle="--", label=f"{name}, unigram model"
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=100)
    plt.close(figure)


def whole_reports(curve: dict[int, float]) -> dict[int, float]:
    """A curve without the reports of single steps that a resumed run begins with: beside means
    over a log interval they look like jumps."""
    steps = list(curve)
    gaps = [later - step for step, later in zip(steps, steps[1:], strict=False)]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0
    return {
        step: curve[step]
        for index, step in enumerate(steps)
        if index == 0 or 2 * gaps[index - 1] >= usual
    }


def _points(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="what pretrain_glm.py printed")
    parser.add_argument("--output", type=Path, required=True, help="picture to write, e.g. a .png")
    parser.add_argument(
        "--baseline", type=Path, help="what tools/measure_unigram.py wrote, to draw as level lines"
    )
    args = parser.parse_args()
    with exit_with_one_line():
        check_picture("--output", args.output)
        with args.log.open(errors="replace") as lines:
            train, valid = read_losses(lines)
        if not train:
            raise GLMError(f"{args.log}: reports no losses; give what pretrain_glm.py printed")
        baseline = read_baseline(args.baseline) if args.baseline else {}
        draw(train, valid, baseline, args.output)


if __name__ == "__main__":
    main()
