"""Times training steps beside stock Megatron's and a compiled Llama's.

    python -m benchmarks.train_step --preset 4096 [--minutes 5] [--plot]

The GLM is `pretrain_glm.py` itself on packed batches of the published mix; "causal" is the same
program on samples without context, and "glm-te" with Transformer Engine's linears; "stock" is
Megatron-Core's GPT without extensions; "llama" is transformers' under torch.compile, which then
gives attention a dense mask, and "llama-causal" the same without one. Each trains in a process of
its own, those of a group take turns in rounds, and the median counts. TFLOP/s are of the paper's
formula with the mask's real work; "products" times the products of a step alone, which is the
ceiling. Every row says in milliseconds where one step's time went. A model that fails has the
reason in its row.
"""

import argparse
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.records import Check, add_run_flags, run_benchmark
from benchmarks.timing import COPY_BYTES
from benchmarks.training.rates import NUM_COPIES
from benchmarks.training.rounds import Entry, Plan, measure
from benchmarks.training.step_plots import plot_components, plot_scaling
from benchmarks.training.turns import Task
from benchmarks.training.work import (
    Load,
    Rates,
    Size,
    attention_flops,
    causal_load,
    formula_load,
    model_flops,
    predicted_seconds,
    product_flops,
)


class Model(NamedTuple):
    """A process: its program, what its steps can be (a row each), the type of its weights."""

    program: str
    variants: tuple[str, ...]
    dtype: str = "bf16"
    options: dict[str, Any] = {}  # noqa: RUF012
    flags: tuple[str, ...] = ()


RATES = "rates"
MODELS = {
    RATES: Model("benchmarks.training.rates", ("products", "attention", "copy")),
    "glm": Model("benchmarks.training.glm", ("glm", "causal")),
    "glm-fp16": Model("benchmarks.training.glm", ("glm-fp16",), "fp16"),
    "glm-te": Model(
        "benchmarks.training.glm", ("glm-te",), flags=("--transformer-impl", "transformer_engine")
    ),
    "llama": Model("benchmarks.training.llama", ("llama",)),
    "llama-causal": Model(
        "benchmarks.training.llama", ("llama-causal",), options={"without_mask": True}
    ),
    "stock": Model("benchmarks.training.stock", ("stock",)),
}


class Preset(NamedTuple):
    """Sizes, and groups of models that fit into one H200 together and take turns."""

    sizes: tuple[Size, ...]
    groups: tuple[tuple[str, ...], ...]


H4096 = Size(12, 4096, 32, 10880, 50304, 2048, micro_batch_size=4, num_micro_batches=8)
H12288 = Size(2, 12288, 96, 32768, 50304, 2048, micro_batch_size=1, num_micro_batches=8)
TINY = Size(2, 64, 4, 160, 512, 128, micro_batch_size=2, num_micro_batches=2)
ALL = (("rates", "glm", "llama"), ("stock",))
PRESETS = {
    "tiny": Preset((TINY,), (*ALL, ("llama-causal",))),
    "4096": Preset((H4096,), (*ALL, ("llama-causal",))),
    "12288": Preset((H12288,), ALL),
    "fp16": Preset((H4096,), (("glm", "glm-fp16"),)),
    # Transformer Engine's linears beside Megatron's; its optimizer is taken by both.
    "linears": Preset((H4096, H12288), (("rates", "glm", "glm-te"),)),
    # As many tokens a step in each.
    "scaling": Preset(
        (
            replace(H4096, num_layers=4), H4096, replace(H4096, num_layers=24),
            replace(H4096, seq_length=8192, micro_batch_size=1),
            replace(H4096, seq_length=32768, micro_batch_size=1, num_micro_batches=2),
        ),
        (("rates", "glm"),),
    ),
}  # fmt: skip


class Table:
    """One size: its groups, one after the other, as rows."""

    def __init__(self, size: Size, arguments: argparse.Namespace):
        self.size, self.arguments = size, arguments
        self.rates: dict[str, float] = {}

    def rows(self, plan: Plan, folder: Path) -> Iterator[dict[str, Any]]:
        """The rows of each group when it is done."""
        for number, group in enumerate(PRESETS[self.arguments.preset].groups):
            entries = {name: self._entry(name) for name in group if name in self.arguments.models}
            for name, outcome in measure(entries, plan, folder / str(number)).items():
                for variant, reports in outcome.reports.items():
                    row = {"size": str(self.size), "model": variant, "dtype": MODELS[name].dtype}
                    if not reports:
                        yield row | {"error": outcome.error or "not reached"}
                    elif name == RATES:
                        yield row | self._ceiling(variant, reports)
                    else:
                        row |= self._speed(reports)
                        if variant == MODELS[name].variants[0]:
                            row |= {f"{part}_ms": ms for part, ms in outcome.components.items()}
                        if outcome.error:
                            row["ended_early"] = outcome.error
                        yield row

    def _entry(self, name: str) -> Entry:
        model, options = MODELS[name], self.arguments
        flags = (*model.flags, *(options.glm_flags if "glm" in model.program else ()))
        task = Task(model.program, self.size, model.dtype, options.dropout, flags, model.options)
        return Entry(task, model.variants, options.components and name != RATES)

    def _ceiling(self, variant: str, reports: list[dict]) -> dict[str, Any]:
        """What the device reaches on a part of the step, kept for the rows after it."""
        seconds = statistics.median(report["seconds"] for report in reports)
        work = {
            "products": product_flops(self.size),
            "attention": attention_flops(self.size, causal_load(self.size)),
            "copy": 2 * NUM_COPIES * COPY_BYTES[reports[0]["device"]],
        }[variant]
        self.rates[variant] = work / seconds
        unit = {"gb_per_s": 1e9} if variant == "copy" else {"tflops": 1e12}
        return {"ms": seconds * 1e3} | {name: work / seconds / by for name, by in unit.items()}

    def _speed(self, reports: list[dict]) -> dict[str, Any]:
        size = self.size
        seconds = statistics.median(report["seconds"] for report in reports)
        loads = [report.get("load", causal_load(size)) for report in reports]
        speed = statistics.median(
            model_flops(size, load) / report["seconds"]
            for load, report in zip(loads, reports, strict=True)
        )
        load = Load(*map(statistics.mean, zip(*loads, strict=True)))
        row = {
            "parameters": reports[0]["parameters"],
            "ms": seconds * 1e3,
            "tflops": speed / 1e12,
            "tokens_per_s": size.num_tokens / seconds,
            "of_square_mask": load.pairs / formula_load(size).pairs,
            "targets_of_tokens": load.targets / size.num_tokens,
        }
        if "products" in self.rates:
            row["of_products"] = speed / self.rates["products"]
        if len(self.rates) == len(Rates._fields):
            rates = Rates(*(self.rates[name] for name in MODELS[RATES].variants))
            predicted = predicted_seconds(size, load, rates)
            row |= {"predicted_ms": predicted * 1e3, "of_predicted": seconds / predicted}
        if "peak_gib" in reports[0]:
            row["peak_gib"] = max(report["peak_gib"] for report in reports)
        if skipped := sum(report.get("skipped", 0) for report in reports):
            row["skipped_steps"] = skipped
        return row | {"round_ms": [round(report["seconds"] * 1e3, 3) for report in reports]}


def judge(rows: list[dict[str, Any]], preset: str) -> list[Check]:
    """The figures that are required of a preset."""
    by_model = {row["model"]: row for row in rows if "error" not in row}

    def value(model: str, key: str = "tflops") -> float | None:
        return by_model.get(model, {}).get(key)

    def ratio(model: str, other: str, key: str = "tflops") -> float | None:
        above, below = value(model, key), value(other, key)
        return above / below if above and below else None

    checks = {
        "4096": [
            Check("TFLOP/s (figure 1)", value("glm"), 600),
            Check("times the compiled Llama's TFLOP/s (figure 1)", ratio("glm", "llama"), 1.15),
            Check("times stock Megatron's TFLOP/s (figure 1)", ratio("glm", "stock"), 2.1),
            Check("times the compiled Llama's tokens/s (figure 1)",
                  ratio("glm", "llama", "tokens_per_s"), 1.15),
            Check("times stock Megatron's tokens/s (figure 1)",
                  ratio("glm", "stock", "tokens_per_s"), 2.1),
            Check("step over what the mask's work explains of a causal step (figure 3)",
                  ratio("causal", "glm"), 1.03, is_floor=False),
            Check("peak memory of stock Megatron's (figure 7)",
                  ratio("glm", "stock", "peak_gib"), 0.55, is_floor=False),
        ],
        "12288": [
            Check("TFLOP/s of the products' (figure 2)", value("glm", "of_products"), 0.85),
        ],
        "fp16": [
            Check("times the TFLOP/s of bf16 in fp16 (figure 5)", ratio("glm-fp16", "glm"), 0.97),
        ],
    }  # fmt: skip
    return checks.get(preset, [])


def run(arguments: argparse.Namespace, context: BaseContext) -> Iterator[dict[str, Any]]:
    """One row for each size and model."""
    deadline = time.monotonic() + 60 * arguments.minutes
    plan = Plan(context, arguments.rounds, arguments.steps, deadline)
    with tempfile.TemporaryDirectory() as name:
        for number, size in enumerate(PRESETS[arguments.preset].sizes):
            yield from Table(size, arguments).rows(plan, Path(name, str(number)))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="4096", help="sizes and models")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="those of the preset's")
    add("--rounds", type=int, default=3, help="turns of each model; the median counts")
    add("--steps", type=int, default=2, help="steps of a turn")
    add("--dropout", type=float, default=0.0, help="of attention and hidden states")
    add("--glm-flags", type=shlex.split, default=[], help="more flags of pretrain_glm.py, quoted")
    add("--no-components", dest="components", action="store_false", help="profile no step")
    add("--minutes", type=float, default=30, help="after which no further step is begun")
    add_run_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, context: BaseContext | None = None) -> None:
    """Measure, print the table, write the record and, if asked, the plot."""
    arguments = parse(argv)
    run_benchmark(
        "train_step", arguments, run(arguments, context or get_context("spawn")),
        plot=plot_scaling if len(PRESETS[arguments.preset].sizes) > 1 else plot_components,
        judge=partial(judge, preset=arguments.preset),
    )


if __name__ == "__main__":
    main()
