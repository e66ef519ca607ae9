"""Operations of a training step: of the model, of the hardware, and of the mask alone.

A multiplication with an addition is two operations. Backward passes take twice the forward's.
"""

from dataclasses import dataclass
from math import exp
from typing import NamedTuple

from megatron_glm.planning.job import Job
from megatron_glm.planning.parameters import parameters_of_model


@dataclass(frozen=True)
class Operations:
    """Of one sequence, forward."""

    layers: int
    """Products with the weights of the layers."""
    logits: int
    attention: int
    """Scores and weighted values of every pair of tokens, whether one sees the other or not."""

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.layers + self.logits + self.attention


def forward_operations(job: Job) -> Operations:
    """Operations of the forward pass of one sequence, over all ranks."""
    s, h, a = job.seq_length, job.hidden_size, job.attention_size
    weights = sum(rows * columns for rows, columns in layer_matrices(job))
    return Operations(
        layers=2 * s * weights * job.num_layers,
        logits=2 * s * h * job.padded_vocab_size,
        attention=4 * s * s * a * job.num_layers,
    )


def layer_matrices(job: Job) -> list[tuple[int, int]]:
    """The weights of a layer as (inputs, outputs), over all tensor parallel ranks: query, key and
    value, attention output, both halves of the FFN's first matrix, and its second."""
    h, f, a = job.hidden_size, job.ffn_hidden_size, job.attention_size
    return [(h, 3 * a), (a, h), (h, 2 * f), (f, h)]


def model_operations(job: Job) -> int:
    """Operations that training on one sequence takes, whatever the implementation: what the model
    FLOPs utilization (MFU) counts.

    With f = 8 h / 3 this is 72 s l h^2 (1 + s / 6h + v / 12lh), l layers and v logits.
    """
    return 3 * forward_operations(job).total


def hardware_operations(job: Job) -> int:
    """Those that the hardware does, recomputation included: what the hardware FLOPs utilization
    (HFU) counts."""
    forward = forward_operations(job)
    return model_operations(job) + round(recomputed_share(job) * forward.layers) + round(
        recomputed_attention_share(job) * forward.attention
    )


def recomputed_share(job: Job) -> float:
    """Share of the products with the weights of layers that is computed again."""
    if job.recompute_granularity == "full":
        return _recomputed_layers(job)
    if job.recompute_granularity == "selective" and "mlp" in job.recompute_modules:
        sizes = [inputs * outputs for inputs, outputs in layer_matrices(job)]
        return sum(sizes[2:]) / sum(sizes)
    return 0.0


def recomputed_attention_share(job: Job) -> float:
    """Share of the attention that is computed again."""
    if job.recompute_granularity == "full":
        return _recomputed_layers(job)
    return float(job.recompute_granularity == "selective" and "core_attn" in job.recompute_modules)


def _recomputed_layers(job: Job) -> float:
    if job.recompute_method != "block":
        return 1.0
    per_chunk = job.num_layers / (job.pipeline_model_parallel_size * job.num_chunks)
    return min(1.0, (job.recompute_num_layers or 1) / per_chunk)


def paper_operations_per_token(job: Job) -> int:
    """Operations a token as GLM-130B's paper counts them (section 2.3, "following the calculation
    in" PaLM, arXiv 2204.02311, appendix B): 6 N + 12 l n d s with N parameters."""
    attention = 12 * job.num_layers * job.attention_size * job.seq_length
    return 6 * parameters_of_model(job) + attention


@dataclass(frozen=True)
class Objective:
    """What the text of a run becomes; fields are named like the flags of pretrain_glm.py."""

    gpt_prob: float = 0.7
    mask_prob: float = 0.15
    average_block_length: float = 3.0
    min_gmask_ratio: float = 0.2
    sentence_mask_prob: float = 0.0
    aggregated_samples_per_sequence: int = 4


class Shares(NamedTuple):
    """What the samples of a run leave of a step's work; as it stands, those of a causal model."""

    visible: float = 0.5
    """Of all pairs of a sequence's tokens, those in which the query sees the key."""
    targets: float = 1.0
    """Of the tokens, those whose logits are computed."""


def shares(objective: Objective) -> Shares:
    """Expected shares. Instruction data and sequences that are cut short (2%) are left out.

    Of a sample whose context is the share x, (1 + x^2) / 2 of its pairs are seen, and 1 - x of its
    tokens are targets.
    """
    # [gMASK]: x is uniform from 0 to 1 - min_gmask_ratio.
    longest = 1 - objective.min_gmask_ratio
    gmask = Shares((1 + longest**2 / 3) / 2, 1 - longest / 2)
    # [MASK]: spans of Poisson length, 0 left out, each of which a sample repeats behind `sop`.
    span = objective.average_block_length / (1 - exp(-objective.average_block_length))
    spans = objective.mask_prob / span
    context = (1 - objective.mask_prob + spans) / (1 + 2 * spans)
    mask = Shares((1 + context**2) / 2 / objective.aggregated_samples_per_sequence, 1 - context)
    mean = (objective.gpt_prob * g + (1 - objective.gpt_prob) * m
            for g, m in zip(gmask, mask, strict=True))
    return Shares(*mean)
