"""Times training steps beside stock Megatron's and a compiled Llama's.

    python -m benchmarks.train_step --preset 4096 [--minutes 5] [--plot]

The GLM is `pretrain_glm.py` itself on packed batches of the published mix; "causal" is the same
program on samples without context, "glm-lean" with the flags that save memory, and "glm-te" with
Transformer Engine's linears; "stock" is Megatron-Core's GPT without extensions; "llama" is
transformers' under torch.compile, which then gives attention a dense mask, and "llama-causal" the
same without one. Each trains in a process of its own, those of a group take turns in rounds, and
the median counts. TFLOP/s are of the paper's formula with the mask's real work; "products" times
the products of a step alone, which is the ceiling. Every row says in milliseconds where one step's
time went. A model that fails has the reason in its row, and one for which there was no room beside
the others was measured by itself ("took_turns").
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
from typing import Any

from benchmarks.records import Check, add_run_flags, run_benchmark
from benchmarks.timing import COPY_BYTES
from benchmarks.training.presets import MODELS, PRESETS, RATES
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
                        if outcome.is_alone:
                            row["took_turns"] = False
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


def judge(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> list[Check]:
    """The figures that are required of a preset at its own sizes."""
    if arguments.micro_batch_size:
        return []
    by_model = {row["model"]: row for row in rows}

    def check(what: str, bound: float, key: str, *models: str, is_floor: bool = True) -> Check:
        """Of a model's value, or of its ratio to another's."""
        values = [by_model.get(model, {}).get(key) for model in models]
        if None in values:
            why = _why_missing(by_model, models[values.index(None)])
            return Check(what, None, bound, is_floor, why)
        value, *other = values
        return Check(what, value / other[0] if other else value, bound, is_floor)

    checks = {
        "4096": [
            check("TFLOP/s (figure 1)", 600, "tflops", "glm"),
            check("times the compiled Llama's TFLOP/s (figure 1)", 1.15, "tflops", "glm", "llama"),
            check("times stock Megatron's TFLOP/s (figure 1)", 2.1, "tflops", "glm", "stock"),
            check("times the compiled Llama's tokens/s (figure 1)", 1.15, "tokens_per_s",
                  "glm", "llama"),
            check("times stock Megatron's tokens/s (figure 1)", 2.1, "tokens_per_s",
                  "glm", "stock"),
            check("step over what the mask's work explains of a causal step (figure 3)", 1.03,
                  "tflops", "causal", "glm", is_floor=False),
        ],
        "12288": [
            check("TFLOP/s of the products' (figure 2)", 0.85, "of_products", "glm"),
        ],
        "memory": [
            check(f"peak memory of stock Megatron's, {model} (figure 7)", 0.55, "peak_gib",
                  model, "stock", is_floor=False)
            for model in ("glm", "glm-lean")
        ],
        "fp16": [
            check("times the TFLOP/s of bf16 in fp16 (figure 5)", 0.97, "tflops",
                  "glm-fp16", "glm"),
        ],
    }  # fmt: skip
    return checks.get(arguments.preset, [])


def _why_missing(by_model: dict[str, dict[str, Any]], model: str) -> str:
    """Why a model has no value, and what to do where it does not fit."""
    for name in (model, "products"):
        if error := by_model.get(name, {}).get("error"):
            fits_elsewhere = "; run it on an H200 or with --micro-batch-size 2"
            return f"{name}: {error}{fits_elsewhere if 'OutOfMemory' in error else ''}"
    return f"{model}: not reached"


def sizes(arguments: argparse.Namespace) -> list[Size]:
    """The preset's, at the micro-batch size that was asked for and as many tokens a step."""
    batch = arguments.micro_batch_size
    return [
        replace(size, micro_batch_size=batch, num_micro_batches=size.num_sequences // batch)
        if batch else size
        for size in PRESETS[arguments.preset].sizes
    ]  # fmt: skip


def run(arguments: argparse.Namespace, context: BaseContext) -> Iterator[dict[str, Any]]:
    """One row for each size and model."""
    deadline = time.monotonic() + 60 * arguments.minutes
    plan = Plan(context, arguments.rounds, arguments.steps, deadline)
    with tempfile.TemporaryDirectory() as name:
        for number, size in enumerate(sizes(arguments)):
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
    add("--dropout", type=float, help="of attention and hidden states; default: the preset's")
    add("--micro-batch-size", type=int, help="instead of the preset's, with as many tokens a step")
    add("--glm-flags", type=shlex.split, default=[], help="more flags of pretrain_glm.py, quoted")
    add("--no-components", dest="components", action="store_false", help="profile no step")
    add("--minutes", type=float, default=30, help="after which no further step is begun")
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    preset, batch = PRESETS[arguments.preset], arguments.micro_batch_size
    if arguments.dropout is None:
        arguments.dropout = preset.dropout
    for size in preset.sizes if batch is not None else ():
        if batch < 1 or size.num_sequences % batch:
            parser.error(f"--micro-batch-size {batch}: must divide the {size.num_sequences} "
                         f"sequences of a step of {size}")
    return arguments


def main(argv: list[str] | None = None, context: BaseContext | None = None) -> None:
    """Measure, print the table, write the record and, if asked, the plot."""
    arguments = parse(argv)
    run_benchmark(
        "train_step", arguments, run(arguments, context or get_context("spawn")),
        plot=plot_scaling if len(PRESETS[arguments.preset].sizes) > 1 else plot_components,
        judge=partial(judge, arguments=arguments),
    )


if __name__ == "__main__":
    main()
