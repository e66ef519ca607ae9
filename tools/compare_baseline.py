"""Compare the held-out loss of a run with a unigram model's; exit with 1 where it is not below.

    python tools/compare_baseline.py LOG --baseline baseline.json
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_glm.errors import exit_with_one_line
from megatron_glm.training.log_lines import read_baseline, read_losses


def compare(last: dict[str, float], baseline: dict[str, float]) -> tuple[str, bool]:
    """A table of both, and whether the model is better in every objective of the baseline.

    last, baseline: objective -> nats per token. An objective without a number is not better.
    """
    rows = [f"{'':10}{'unigram model':>15}{'this GLM':>12}   nats per held-out token"]
    for name, loss in baseline.items():
        rows.append(f"{name:10}{loss:15.3f}{last.get(name, float('nan')):12.3f}")
    is_better = all(last.get(name, float("nan")) < loss for name, loss in baseline.items())
    return "\n".join(rows), is_better


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path, help="what pretrain_glm.py printed")
    parser.add_argument(
        "--baseline", type=Path, required=True, help="what tools/measure_unigram.py wrote"
    )
    args = parser.parse_args()
    with exit_with_one_line():
        with args.log.open(errors="replace") as lines:
            _, valid = read_losses(lines)
        last = {name: curve[max(curve)] for name, curve in valid.items() if curve}
        table, is_better = compare(last, read_baseline(args.baseline))
        print(table)
    if not is_better:
        sys.exit(f"compare_baseline: {args.log}: not below the unigram model in every objective")


if __name__ == "__main__":
    main()
