"""A job of many ranks from the times of its stages: bubble, communication, share of the peak."""

from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.training.work import Size, formula_load, model_flops, num_weights

WHOLE_JOB = "whole job"


class Layout(NamedTuple):
    """A job: its model with the micro-batches that are timed, and how ranks share it."""

    size: Size
    tensor: int
    pipeline: int
    data: int
    edge_layers: int
    """Layers of the first and the last stage, which also hold the embedding."""
    num_micro_batches: int
    """Of the job's step, in each pipeline."""

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def stages(self) -> tuple[int, int, int]:
        """The first, a middle and the last stage."""
        return 0, self.pipeline // 2, self.pipeline - 1

    def num_layers(self, stage: int) -> int:
        if stage in (0, self.pipeline - 1):
            return self.edge_layers
        return (self.size.num_layers - 2 * self.edge_layers) // (self.pipeline - 2)

    def stage_size(self, stage: int) -> Size:
        """The model of one stage over all its tensor parallel ranks: logits on the last alone."""
        is_last = stage == self.pipeline - 1
        return replace(
            self.size, num_layers=self.num_layers(stage),
            vocab_size=self.size.vocab_size if is_last else 0,
        )  # fmt: skip

    def job_size(self) -> Size:
        """The whole model and batch."""
        return replace(self.size, num_micro_batches=self.num_micro_batches * self.data)


LAYOUTS = {
    "tiny": Layout(Size(7, 64, 4, 160, 512, 128, 1, 4), 2, 3, 2, 2, 8),
    # Batch 4224 over DP 24.
    "130b": Layout(Size(70, 12288, 96, 32768, 150528, 2048, 1, 16), 4, 8, 24, 8, 176),
}


class Links(NamedTuple):
    """What one GPU sends or receives, bytes a second."""

    inside_node: float
    between_nodes: float


class Times(NamedTuple):
    """Seconds on one stage."""

    micro_batch: float
    optimizer: float


def exposed_seconds(layout: Layout, stage: int, links: Links) -> float:
    """Communication of a micro-batch that nothing hides, under sequence parallelism.

    Each layer gathers and scatters hidden states twice forward and gathers gradients twice
    backward; what else it sends backward goes beside a product. The pipeline's neighbours get
    activations and gradients of a tensor parallel rank's tokens, while the schedule waits.
    """
    hidden = 2 * layout.size.micro_batch_tokens * layout.size.hidden_size
    share = (layout.tensor - 1) / layout.tensor
    inside = 6 * layout.num_layers(stage) * share * hidden / links.inside_node
    return inside + 2 * hidden / layout.tensor / links.between_nodes


def sharding_seconds(layout: Layout, links: Links, micro_batch: float) -> float:
    """Scattering gradients (32 bit) and gathering weights (16 bit) of a rank over DP, each less
    what a backward and a forward pass hide of it."""
    sizes = map(layout.stage_size, layout.stages)
    weights = max(map(num_weights, sizes)) / layout.tensor
    share = (layout.data - 1) / layout.data
    scatter, gather = (width * weights * share / links.between_nodes for width in (4, 2))
    return max(0.0, scatter - micro_batch * 2 / 3) + max(0.0, gather - micro_batch / 3)


def job_row(layout: Layout, times: dict[int, Times], links: Links, peak: float) -> dict[str, Any]:
    """The whole job's step from those of its stages; the slowest stage sets the pace."""
    passes = layout.num_micro_batches + layout.pipeline - 1
    alone = max(each.micro_batch for each in times.values())
    pace = max(t.micro_batch + exposed_seconds(layout, s, links) for s, t in times.items())
    optimizer = max(each.optimizer for each in times.values())
    step = passes * pace + optimizer + sharding_seconds(layout, links, alone)
    size = layout.job_size()
    flops = model_flops(size, formula_load(size))
    return {
        "stage": WHOLE_JOB,
        "step_ms": step * 1e3,
        "bubble": (layout.pipeline - 1) / passes,
        "communication": 1 - (passes * alone + optimizer) / step,
        "tokens_per_s_per_gpu": size.num_tokens / step / layout.num_gpus,
        "tflops": flops / step / layout.num_gpus / 1e12,
        "mfu": flops / step / layout.num_gpus / peak,
    }
