"""Keep a run's log and show its progress: a short table instead of everything that is logged.

    torchrun pretrain_glm.py FLAGS 2>&1 |
        python tools/show_progress.py --log train.log --seq-length 256
"""

import argparse
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES
from megatron_glm.training.log_lines import LogLine, read_line

_RESUMED = re.compile(r"successfully loaded checkpoint .* at iteration (\d+)")
_NEWS = (
    (_RESUMED, "resumed after step {}"),
    (re.compile(r"successfully saved checkpoint from iteration +(\d+)"), "saved after step {}"),
    (re.compile(r"(pretrain_glm\.py: error: .*)"), "{}"),
    # The last line of a traceback; torchrun's own say nothing behind the colon.
    (re.compile(r"^(?:\[rank\d+\]: )?([\w.]+(?:Error|Exception): \S.*)"), "{}"),
)


def show(lines: Iterable[str], seq_length: int) -> Iterator[str]:
    """The lines to show for the lines of a log. seq_length: tokens in a sequence."""
    columns: list[str] = []
    last_news = None
    resumed = None
    for line in lines:
        report = read_line(line)
        if report is None:
            news = _news(line)
            if match := _RESUMED.search(line):
                resumed = int(match[1])
            # A run that ends where it saves says so twice.
            if news and news != last_news:
                yield f"  {news}"
                last_news = news
            continue
        if report.iteration - 1 == resumed and not report.is_valid:
            # A run reports its first step by itself, which has waited for all that is set up late.
            continue
        names = [name for name in OBJECTIVE_NAMES.values() if name in report.losses]
        if report.is_valid:
            losses = ", ".join(f"{name} {report.losses[name]:.3f}" for name in names)
            yield f"  held-out loss after step {report.iteration}: {losses}"
            continue
        if names != columns:
            columns = names
            heads = "".join(f"{name:>10}" for name in names)
            yield f"{'step':>14}{heads}{'tokens/s':>10}{'left':>10}"
        yield "  " + _row(report, names, seq_length)


def _news(line: str) -> str | None:
    for pattern, text in _NEWS:
        if match := pattern.search(line):
            return text.format(match[1])
    return None


def _row(report: LogLine, names: list[str], seq_length: int) -> str:
    seconds = report.iteration_ms / 1000
    speed = report.batch_size * seq_length / seconds
    minutes, left = divmod(round(seconds * (report.num_iterations - report.iteration)), 60)
    step = f"{report.iteration}/{report.num_iterations}"
    losses = "".join(f"{report.losses[name]:10.3f}" for name in names)
    return f"{step:>12}{losses}{speed:10,.0f}{minutes:7d}:{left:02d}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--log", type=Path, required=True, help="file to append every line to")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens in a sequence")
    args = parser.parse_args()
    # Ctrl-C is for the run; what it says while it ends still belongs into the log.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with args.log.open("a") as log:
        for line in show(tee(sys.stdin, log), args.seq_length):
            print(line, flush=True)


def tee(lines: Iterable[str], log) -> Iterator[str]:
    """The lines, each written to `log` at once."""
    for line in lines:
        log.write(line)
        log.flush()
        yield line


if __name__ == "__main__":
    main()
