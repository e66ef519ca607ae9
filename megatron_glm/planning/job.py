"""A training run as numbers: sizes of the model, its layout over ranks, what is kept for backward.

Letters in formulas, as Megatron uses them: s sequence length, b micro-batch size, h hidden size,
f FFN size, n heads, v vocabulary, t and p tensor and pipeline parallel size.
"""

from argparse import Namespace
from dataclasses import dataclass, fields, replace

import torch

from megatron_glm.errors import GLMError, flag_of
from megatron_glm.planning.batch_sizes import SMALLEST_BATCH, smallest_batch


class PlanError(GLMError):
    """A run that Megatron would not start, or that these forecasts do not cover."""


# Flags that change what a rank holds in ways that are not forecast, and what they must be.
NOT_FORECAST = {
    "optimizer_cpu_offload": False,
    "cpu_offloading": False,
    "fine_grained_activation_offloading": False,
    "num_microbatches_with_partial_activation_checkpoints": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "num_distributed_optimizer_instances": 1,
    "nccl_ub": False,
    "mlp_chunks_for_training": 1,
}
RECOMPUTE_MODULES = ("core_attn", "mlp")
"""Of --recompute-modules, those that are forecast."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of an element, by dtype."""
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "fp8"}
"""Names of dtypes, as flags have them."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a forecast depends on; fields are named like the flags of pretrain_glm.py."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    padded_vocab_size: int
    seq_length: int
    kv_channels: int | None = None
    """Dimension of a head; None for hidden size / heads."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks of a stage, 2 or more; None without interleaving."""
    data_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    sequence_parallel: bool = False

    micro_batch_size: int = 1
    global_batch_size: int = 1
    """Sequences of a step over all ranks, after the ramp."""

    dtype: str = "bf16"
    """Of parameters and activations: fp32, bf16 or fp16 (--bf16, --fp16)."""
    accumulate_allreduce_grads_in_fp32: bool = True
    use_distributed_optimizer: bool = False
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: str = "fp32"
    exp_avg_sq_dtype: str = "fp32"
    """How the moments of Adam are stored, keys of BYTES."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False

    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    recompute_modules: tuple[str, ...] = ()
    distribute_saved_activations: bool = False
    glm_recompute_norms_and_geglu: bool = False
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    glm_attention_backend: str = "auto"
    """What auto chooses is taken to be none that keeps anything twice, as "flex" with dropout."""
    glm_fused_kernels: bool = True
    """Whether operations between matrix products are Triton kernels."""

    def __post_init__(self):
        self._check_divisions()

    @property
    def world_size(self) -> int:
        """GPUs of the run."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.data_parallel_size
        )

    @property
    def num_chunks(self) -> int:
        """Model chunks of a pipeline stage."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def smallest_batch(self) -> int:
        """Sequences of which every step must have a multiple."""
        return smallest_batch(self.micro_batch_size, self.data_parallel_size,
                              self.pipeline_model_parallel_size, self.num_chunks > 1)  # fmt: skip

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step in one pipeline."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, s * b."""
        return self.seq_length * self.micro_batch_size

    @property
    def element_size(self) -> int:
        """Bytes of a parameter or an activation."""
        return BYTES[self.dtype]

    @property
    def has_split_weights(self) -> bool:
        """Whether the optimizer keeps of a main weight the half alone that a bf16 weight lacks."""
        return self.use_precision_aware_optimizer and self.dtype == "bf16"

    @property
    def head_size(self) -> int:
        """Dimension of a head, d."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def attention_size(self) -> int:
        """Width of all heads together, n * d."""
        return self.num_attention_heads * self.head_size

    def with_(self, **changes) -> "Job":
        """A copy with other values; raises PlanError where these cannot be trained."""
        return replace(self, **changes)

    def _check_divisions(self) -> None:
        t = self.tensor_model_parallel_size
        _divides("--tensor-model-parallel-size", t, "--num-attention-heads",
                 self.num_attention_heads)
        _divides("--tensor-model-parallel-size", t, "--ffn-hidden-size", self.ffn_hidden_size)
        _divides("--tensor-model-parallel-size", t, "--padded-vocab-size", self.padded_vocab_size)
        if self.sequence_parallel:
            _divides("--sequence-parallel at --tensor-model-parallel-size", t, "--seq-length",
                     self.seq_length)
        if self.global_batch_size % self.smallest_batch:
            raise PlanError(
                f"--global-batch-size {self.global_batch_size}: must be divisible by "
                f"{self.smallest_batch}, {SMALLEST_BATCH}"
            )


def _divides(flag: str, divisor: int, of: str, value: int) -> None:
    if value % divisor:
        raise PlanError(f"{flag} {divisor}: must divide {of} {value}; change either")


def job_from_args(args: Namespace) -> Job:
    """The job of flags that Megatron has validated (`validate_args`).

    Raises PlanError, naming the flag, where a flag is not covered.
    """
    for dest, covered in NOT_FORECAST.items():
        value = getattr(args, dest, covered)
        if value != covered:
            raise PlanError(f"{flag_of(dest)} {value}: not forecast; plan without it")
    for module in args.recompute_modules or ():
        if module not in RECOMPUTE_MODULES:
            raise PlanError(f"--recompute-modules {module}: not forecast; plan without it")
    names = [field.name for field in fields(Job) if field.name != "dtype"]
    given = {name: getattr(args, name) for name in names}
    # What Megatron takes where none is named.
    usual = ("core_attn",) if args.recompute_granularity == "selective" else ()
    given["recompute_modules"] = tuple(args.recompute_modules or usual)
    for moment in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        given[moment] = DTYPES[given[moment]]
    given["dtype"] = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    return Job(**given)
