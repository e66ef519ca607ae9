"""A plan in words: headline first, then tables; and the flags of a layout."""

from dataclasses import asdict
from typing import Any

from megatron_glm.errors import flag_of
from megatron_glm.planning.job import Job
from megatron_glm.planning.memory import GIB, MemoryForecast
from megatron_glm.planning.operations import forward_operations
from megatron_glm.planning.parameters import parameters_of_model
from megatron_glm.planning.plan import Plan
from megatron_glm.planning.schedule import stage_layers

MEMORY_KINDS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporary": "temporary",
    "other": "workspaces, NCCL, CUDA",
}
"""Kinds of memory, by name in a forecast, and how they are called."""


def memory_kinds(forecast: MemoryForecast) -> dict[str, int]:
    """Bytes of a forecast by kind, keys of MEMORY_KINDS; they sum to its total."""
    kinds = {kind: getattr(forecast, kind) for kind in MEMORY_KINDS if kind != "other"}
    return kinds | {"other": forecast.total - sum(kinds.values())}


def time_kinds(plan: Plan) -> dict[str, float]:
    """Seconds of a step by kind; they sum to the step."""
    time, passes = plan.time, plan.time.passes
    return {
        "matrix products": passes.products,
        "attention": passes.attention,
        "memory-bound": passes.memory,
        "tensor parallel links": passes.tensor_links,
        "pipeline links": passes.pipeline_links,
        "launching, waiting": passes.host,
        "bubble": time.bubble,
        "data parallel links": time.data_links,
        "optimizer": time.optimizer,
    }


def headline(plan: Plan) -> list[str]:
    """What it comes to, in three to five lines."""
    job, cluster = plan.job, plan.cluster
    where = f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    lines = [
        f"{parameters_of_model(job) / 1e9:.1f}B parameters on {where}: {layout(job)}",
        f"  memory  {plan.fullest.total / GIB:.1f} of {cluster.gpu.memory / GIB:.1f} GiB "
        f"({plan.memory_share:.0%}) on a rank of stage {plan.fullest.stage}, the fullest",
        f"  step    {plan.time.step:.4g} s for {job.global_batch_size} sequences of "
        f"{job.seq_length}: {plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%} "
        f"({plan.mfu * cluster.gpu.peak / 1e12:.1f} TFLOP/s a GPU)"
        + (f", HFU {plan.hfu:.1%}" if plan.hfu > plan.mfu else ""),
    ]
    if job.pipeline_model_parallel_size > 1:
        chunks = f" of {job.num_chunks} chunks" if job.num_chunks > 1 else ""
        lines.append(
            f"  bubble  {plan.time.bubble / plan.time.step:.1%} of it: {job.num_microbatches} "
            f"micro-batches in {job.pipeline_model_parallel_size} stages{chunks}"
        )
    if plan.days is not None:
        tokens = plan.run.samples * job.seq_length
        lines.append(
            f"  run     {plan.days:.1f} days for {plan.run.samples:,} sequences "
            f"({tokens / 1e9:.4g}B tokens), if nothing fails"
        )
    return lines


def layout(job: Job) -> str:
    """A layout in a few words."""
    return (
        f"TP {job.tensor_model_parallel_size} x PP {job.pipeline_model_parallel_size} x "
        f"DP {job.data_parallel_size}, micro-batch {job.micro_batch_size}, {recomputation(job)}"
    )


def recomputation(job: Job) -> str:
    """What is recomputed, in a few words."""
    if job.recompute_granularity != "full":
        parts = ["norms and GeGLU"] * job.glm_recompute_norms_and_geglu
        if job.recompute_granularity == "selective":
            parts += job.recompute_modules
        return f"{', '.join(parts) or 'nothing'} recomputed"
    if job.recompute_method == "block":
        return f"{job.recompute_num_layers} layers of a stage recomputed"
    return "all recomputed"


def memory_table(plan: Plan) -> list[str]:
    """GiB of every stage by kind."""
    names = [f"{name.partition(',')[0]:>12}" for name in MEMORY_KINDS.values()]
    lines = [f"{'GiB, stage':>10} {'layers':>6}" + "".join(names) + f"{'in all':>9}"]
    for forecast in plan.memory:
        kinds = memory_kinds(forecast).values()
        layers = sum(stage_layers(plan.job)[forecast.stage])
        lines.append(
            f"{forecast.stage:>10} {layers:>6}"
            + "".join(f"{size / GIB:>12.2f}" for size in kinds)
            + f"{forecast.total / GIB:>9.2f}"
        )
    return lines


def time_table(plan: Plan) -> list[str]:
    """Shares of a step by kind, the largest first."""
    kinds = sorted(time_kinds(plan).items(), key=lambda item: -item[1])
    return [
        f"{name:>24} {seconds:>9.3f} s {seconds / plan.time.step:>6.1%}"
        for name, seconds in kinds
        if seconds > 0
    ]


def plans_table(plans: list[Plan]) -> list[str]:
    """One line a plan."""
    lines = [
        f"{'TP':>3} {'PP':>3} {'DP':>4} {'micro':>5} {'chunks':>6}  {'recomputed':<20} "
        f"{'GiB':>6} {'bubble':>6} {'step s':>7} {'MFU':>6} {'tokens/s':>12} {'days':>7}"
    ]
    for plan in plans:
        job = plan.job
        days = "" if plan.days is None else f"{plan.days:.1f}"
        recomputed = recomputation(job).removesuffix(" recomputed")
        lines.append(
            f"{job.tensor_model_parallel_size:>3} {job.pipeline_model_parallel_size:>3} "
            f"{job.data_parallel_size:>4} {job.micro_batch_size:>5} {job.num_chunks:>6}  "
            f"{recomputed:<20} {plan.fullest.total / GIB:>6.1f} "
            f"{plan.time.bubble / plan.time.step:>6.1%} {plan.time.step:>7.4g} {plan.mfu:>6.1%} "
            f"{plan.tokens_per_second:>12,.0f} {days:>7}"
        )
    return lines


def flags(plan: Plan) -> list[str]:
    """The flags of pretrain_glm.py that make this layout."""
    job, words = plan.job, []
    for name in (
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size",
        "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers",
        "recompute_granularity", "recompute_method", "recompute_num_layers",
    ):  # fmt: skip
        if (value := getattr(job, name)) is not None:
            words += [flag_of(name), str(value)]
    if job.recompute_granularity == "selective":
        words += ["--recompute-modules", *job.recompute_modules]
    if job.num_chunks > 1:
        words += ["--num-virtual-stages-per-pipeline-rank", str(job.num_chunks)]
    for name in (
        "sequence_parallel", "use_distributed_optimizer", "use_precision_aware_optimizer",
        "overlap_grad_reduce", "overlap_param_gather", "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split", "distribute_saved_activations",
        "glm_recompute_norms_and_geglu",
    ):  # fmt: skip
        if getattr(job, name):
            words.append(flag_of(name))
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if (dtype := getattr(job, name)) != "fp32":
            words += [flag_of(name), dtype]
    if plan.rounds_ramp:
        words.append("--decrease-batch-size-if-needed")
    return words


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything about a plan: bytes, seconds, operations and shares as plain numbers."""
    forward = forward_operations(plan.job)
    return {
        "job": asdict(plan.job),
        "flags": flags(plan),
        "cluster": asdict(plan.cluster),
        "overheads": asdict(plan.overheads),
        "shares": plan.run.shares._asdict(),
        "parameters": parameters_of_model(plan.job),
        "operations_forward": asdict(forward),
        "memory": [
            asdict(forecast)
            | {"allocated": forecast.allocated, "reserved": forecast.reserved,
               "total": forecast.total}
            for forecast in plan.memory
        ],
        "memory_share": plan.memory_share,
        "seconds": time_kinds(plan) | {"step": plan.time.step},
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "hfu": plan.hfu,
        "days": plan.days,
        "warnings": plan.warnings,
    }  # fmt: skip
