"""Pipelines: layers of a stage, micro-batches in flight, and the share of time spent waiting."""

from collections.abc import Iterator
from functools import cache

from megatron_glm.planning.job import Job, PlanError


@cache
def stage_layers(job: Job) -> list[list[int]]:
    """Layers of every chunk of every pipeline stage, [p][chunks], as Megatron deals them.

    Raises PlanError where it could not.
    """
    p, chunks = job.pipeline_model_parallel_size, job.num_chunks
    first, last = job.decoder_first_pipeline_num_layers, job.decoder_last_pipeline_num_layers
    embedding, loss = (
        job.account_for_embedding_in_pipeline_split, job.account_for_loss_in_pipeline_split,
    )
    fixed = {stage: layers for stage, layers in ((0, first), (p - 1, last)) if layers is not None}
    if fixed and (embedding or loss):
        raise PlanError(
            "--decoder-first-pipeline-num-layers (or -last-) with --account-for-embedding-in-"
            "pipeline-split (or -loss-): Megatron takes either; drop one"
        )
    rest, stages_left = job.num_layers + embedding + loss - sum(fixed.values()), p - len(fixed)
    if rest < 0 or (rest % stages_left if stages_left else rest):
        raise PlanError(
            f"--pipeline-model-parallel-size {p}: {rest} layers cannot be dealt evenly to "
            f"{stages_left} stages; choose another size, --decoder-first-pipeline-num-layers and "
            "-last-, or --account-for-embedding-in-pipeline-split and -loss-"
        )
    per_stage = [fixed.get(stage, rest // stages_left if stages_left else 0) for stage in range(p)]
    if any(layers % chunks for layers in per_stage):
        raise PlanError(
            f"{chunks} virtual stages: must divide the {per_stage[0]} and {per_stage[-1]} layers "
            "of the stages; change --num-virtual-stages-per-pipeline-rank"
        )
    layers = [[number // chunks] * chunks for number in per_stage]
    layers[0][0] -= embedding
    layers[-1][-1] -= loss
    return layers


def passes(job: Job, stage: int, num_microbatches: int) -> Iterator[tuple[str, int]]:
    """The passes of one step on a stage, in order: ("forward" or "backward", chunk).

    1F1B, or Megatron's interleaved form of it (arXiv 2104.04473, section 2.2).
    """
    p, chunks, m = job.pipeline_model_parallel_size, job.num_chunks, num_microbatches
    group = p if chunks > 1 else m
    order = [
        chunk
        for begin in range(0, m, group)
        for chunk in range(chunks)
        for _ in range(begin, min(begin + group, m))
    ]
    warmup = p - stage - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * group
    warmup = min(warmup, len(order))
    yield from (("forward", chunk) for chunk in order[:warmup])
    for forward, backward in zip(order[warmup:], order, strict=False):
        yield "forward", forward
        yield "backward", chunks - 1 - backward
    yield from (("backward", chunks - 1 - chunk) for chunk in order[len(order) - warmup :])


def microbatches_in_flight(job: Job, stage: int, kept_bytes: tuple[int, ...]) -> list[int]:
    """Micro-batches whose activations each chunk keeps when a stage keeps most bytes.

    kept_bytes: of one micro-batch in each chunk.
    """
    counts, most, at_most = [0] * job.num_chunks, -1, []
    # After the third group of p micro-batches all is as it was.
    few = min(job.num_microbatches, 3 * job.pipeline_model_parallel_size)
    for kind, chunk in passes(job, stage, few):
        counts[chunk] += 1 if kind == "forward" else -1
        kept = sum(n * size for n, size in zip(counts, kept_bytes, strict=True))
        if kept > most:
            most, at_most = kept, list(counts)
    return at_most


def bubble_share(job: Job) -> float:
    """Share of a step in which a stage waits for others, (p - 1) / (m c + p - 1) with c chunks.

    GLM-130B's appendix B.4 (equation 5), and arXiv 2104.04473, section 2.2, for c above 1.
    """
    waiting = job.pipeline_model_parallel_size - 1
    return waiting / (job.num_microbatches * job.num_chunks + waiting)
