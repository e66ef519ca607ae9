"""Times one rank of GLM-130B's training at its real size, and what the whole job would reach.

    python -m benchmarks.one_rank_130b [--nvlink-gb-s 360] [--network-gb-s 50] [--plot]

TP 4 x PP 8 x DP 24, one micro-batch of 2048 tokens, no recomputation: for the first, a middle and
the last stage, Megatron's own step on one GPU with as many micro-batches in flight as on that
stage and communication that answers at once. Rows: a micro-batch forward and backward, the
optimizer's step on its shard, the peak of memory beside the forecast of tools/plan_run.py, and the
share of the chip's peak (MFU) by the paper's formula, which counts all pairs of a sequence. The
last row adds the pipeline's bubble and communication at the given link speeds.
"""

import argparse
import shlex
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import Check, add_run_flags, run_benchmark
from benchmarks.training.job import LAYOUTS, WHOLE_JOB, Layout, Links, Times, job_row
from benchmarks.training.rounds import Entry, Plan, measure
from benchmarks.training.turns import Task
from benchmarks.training.work import formula_load, model_flops
from megatron_glm.planning.job import Job
from megatron_glm.planning.memory import rank_memory

# Dense bf16 and fp16, by the name of the device, in TFLOP/s.
PEAKS = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.5, "A100": 312.0}


def stage_flags(layout: Layout) -> tuple[str, ...]:
    """Flags of the job beside its sizes and TP, PP and DP."""
    return (
        "--sequence-parallel", "--overlap-grad-reduce", "--overlap-param-gather",
        "--decoder-first-pipeline-num-layers", str(layout.edge_layers),
        "--decoder-last-pipeline-num-layers", str(layout.edge_layers),
    )  # fmt: skip


def planned_job(layout: Layout, arguments: argparse.Namespace) -> Job:
    """The same job for the forecast of its memory."""
    size = layout.size
    return Job(
        num_layers=size.num_layers, hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size, num_attention_heads=size.num_heads,
        padded_vocab_size=size.vocab_size, seq_length=size.seq_length,
        tensor_model_parallel_size=layout.tensor, pipeline_model_parallel_size=layout.pipeline,
        data_parallel_size=layout.data, decoder_first_pipeline_num_layers=layout.edge_layers,
        decoder_last_pipeline_num_layers=layout.edge_layers, sequence_parallel=True,
        micro_batch_size=size.micro_batch_size, global_batch_size=size.num_sequences * layout.data,
        dtype=arguments.dtype, use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True, hidden_dropout=arguments.dropout,
        attention_dropout=arguments.dropout,
    )  # fmt: skip


def stage_row(
    layout: Layout, stage: int, reports: list[dict], arguments: argparse.Namespace
) -> dict[str, Any]:
    """A stage's row from the reports of its rounds."""
    size = layout.stage_size(stage)
    optimizer = statistics.median(report["optimizer_s"] for report in reports)
    step = statistics.median(report["seconds"] for report in reports)
    micro_batch = (step - optimizer) / layout.size.num_micro_batches
    flops = model_flops(size, formula_load(size)) / layout.tensor / size.num_micro_batches
    row = {
        "stage": stage,
        "layers": layout.num_layers(stage),
        "parameters": reports[0]["parameters"],
        "micro_batch_ms": micro_batch * 1e3,
        "optimizer_ms": optimizer * 1e3,
        "tflops": flops / micro_batch / 1e12,
        "mfu": flops / micro_batch / (arguments.peak_tflops * 1e12),
    }
    forecast = rank_memory(planned_job(layout, arguments), stage).allocated / 2**30
    row["forecast_gib"] = forecast
    if "peak_gib" in reports[0]:
        peak = max(report["peak_gib"] for report in reports)
        row |= {"peak_gib": peak, "of_forecast": peak / forecast}
    if skipped := sum(report.get("skipped", 0) for report in reports):
        row["skipped_steps"] = skipped
    return row


def run(arguments: argparse.Namespace, context: BaseContext) -> Iterator[dict[str, Any]]:
    """A row for each stage, and one for the whole job where all were measured."""
    layout = LAYOUTS[arguments.preset]
    links = Links(arguments.nvlink_gb_s * 1e9, arguments.network_gb_s * 1e9)
    plan = Plan(context, arguments.rounds, 1, time.monotonic() + 60 * arguments.minutes)
    times: dict[int, Times] = {}
    with tempfile.TemporaryDirectory() as name:
        for stage in layout.stages:
            task = Task(
                "benchmarks.training.one_rank", layout.size, arguments.dtype, arguments.dropout,
                (*stage_flags(layout), *arguments.glm_flags),
                {"layout": (layout.tensor, layout.pipeline, layout.data), "stage": stage},
            )  # fmt: skip
            entries = {f"stage {stage}": Entry(task, ("glm",))}
            (outcome,) = measure(entries, plan, Path(name, str(stage))).values()
            reports = outcome.reports["glm"]
            if not reports:
                yield {"stage": stage, "error": outcome.error or "not reached"}
                continue
            row = stage_row(layout, stage, reports, arguments)
            times[stage] = Times(row["micro_batch_ms"] / 1e3, row["optimizer_ms"] / 1e3)
            yield row
    if len(times) == len(layout.stages):
        yield job_row(layout, times, links, arguments.peak_tflops * 1e12)


def judge(rows: list[dict[str, Any]], preset: str) -> list[Check]:
    """The figures that are required at the real size."""
    if preset != "130b":
        return []
    job = [row["mfu"] for row in rows if row["stage"] == WHOLE_JOB]
    stages = [row for row in rows if row["stage"] != WHOLE_JOB and "error" not in row]
    middle = [row["mfu"] for row in stages if row["stage"] == LAYOUTS[preset].stages[1]]
    errors = [abs(row["of_forecast"] - 1) for row in stages if "of_forecast" in row]
    why = next((f"stage {row['stage']}: {row['error']}" for row in rows if "error" in row), "")
    return [
        Check("share of the peak on a middle stage (figure 6)", *(middle or [None]), 0.60, why=why),
        Check("share of the peak of the whole job (figure 6)", *(job or [None]), 0.60, why=why),
        Check("memory beside its forecast, off by (figure 6)", max(errors, default=None), 0.05,
              is_floor=False, why=why),
    ]  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the share of the peak, and of memory beside its forecast."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = [f"stage {row['stage']}" if "layers" in row else row["stage"] for row in rows]
    speed.bar(labels, [row["mfu"] for row in rows])
    speed.set_ylabel("share of the chip's peak (MFU)")
    stages = [row for row in rows if row["stage"] != WHOLE_JOB]
    at = range(len(stages))
    memory.bar([x - 0.2 for x in at], [row.get("peak_gib", 0) for row in stages], 0.4,
               label="measured")  # fmt: skip
    memory.bar([x + 0.2 for x in at], [row["forecast_gib"] for row in stages], 0.4,
               label="forecast")  # fmt: skip
    memory.set_xticks(list(at), [f"stage {row['stage']}" for row in stages])
    memory.set_ylabel("GiB")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peak_tflops() -> float | None:
    """Of this machine's GPU, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=LAYOUTS, default="130b")
    add("--dtype", choices=["bf16", "fp16"], default="bf16")
    add("--dropout", type=float, default=0.1, help="of attention and hidden states")
    add("--rounds", type=int, default=3, help="steps of each stage; the median counts")
    add("--glm-flags", type=shlex.split, default=[], help="more flags of pretrain_glm.py, quoted")
    add("--nvlink-gb-s", type=float, default=360,
        help="GB/s of a collective inside a node; assumed is 0.8 of NVLink 4's 450 each way")
    add("--network-gb-s", type=float, default=50,
        help="GB/s of a GPU to other nodes; assumed is its own link of 400 Gbit/s")
    add("--peak-tflops", type=float, default=peak_tflops(), help="of the chip, dense 16 bit")
    add("--minutes", type=float, default=30, help="after which no further step is begun")
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    if arguments.peak_tflops is None:
        parser.error(f"--peak-tflops: not known of this device; known are {', '.join(PEAKS)}")
    return arguments


def main(argv: list[str] | None = None, context: BaseContext | None = None) -> None:
    """Measure, print the table, write the record and, if asked, the plot."""
    arguments = parse(argv)
    run_benchmark(
        "one_rank_130b", arguments, run(arguments, context or get_context("spawn")),
        plot=plot, judge=partial(judge, preset=arguments.preset),
    )  # fmt: skip


if __name__ == "__main__":
    main()
