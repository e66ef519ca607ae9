"""Bytes of GPU memory that a rank takes at the worst moment of a step."""

from dataclasses import dataclass

from megatron_glm.planning import activations, temporaries
from megatron_glm.planning.job import Job
from megatron_glm.planning.parameters import is_first, is_last, state_bytes
from megatron_glm.planning.schedule import microbatches_in_flight

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Overheads:
    """Memory beside the tensors of a step. Assumptions until they are measured on the machine:
    each can be replaced by what torch.cuda.memory_stats() and nvidia-smi say there."""

    cuda_context: int = 600 * MIB
    """CUDA context with the loaded kernels of torch, cuBLAS and Triton, outside torch's allocator.
    A fresh process that has multiplied two matrices shows 400 to 600 MiB in nvidia-smi."""

    nccl: int = 1 * GIB
    """Buffers of the communicators (tensor, pipeline and data parallel, embedding, world), outside
    torch's allocator: NCCL takes some 10 MiB a channel and peer, 100 to 300 MiB a communicator.
    Counted where there is more than one GPU."""

    cublas_workspace: int = 64 * MIB
    """Workspaces of cuBLAS and cuBLASLt, in torch's allocator: 32 MiB each on Hopper (torch's
    notes on CUDA semantics, CUBLAS_WORKSPACE_CONFIG)."""

    fragmentation: float = 0.03
    """Share of the tensors' bytes that torch's allocator reserves beyond them. Small with
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True."""


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes of a rank of one pipeline stage at its worst moment."""

    stage: int
    parameters: int
    gradients: int
    """Megatron's gradient buffers."""
    optimizer: int
    """fp32 main parameters and two moments."""
    activations: int
    """What autograd keeps of the micro-batches in flight."""
    temporary: int
    """What else is alive at the moment of the peak: of a backward pass or of the optimizer."""
    moment: str
    """What the rank is doing then."""
    workspace: int
    """Library workspaces and lasting buffers in torch's allocator."""
    outside: int
    """CUDA context and communicators, outside torch's allocator."""
    fragmentation: int

    @property
    def allocated(self) -> int:
        """What torch.cuda.max_memory_allocated() reports."""
        return (
            self.parameters + self.gradients + self.optimizer + self.activations + self.temporary
            + self.workspace
        )  # fmt: skip

    @property
    def reserved(self) -> int:
        """What torch.cuda.max_memory_reserved() reports."""
        return self.allocated + self.fragmentation

    @property
    def total(self) -> int:
        """What nvidia-smi reports of the process."""
        return self.reserved + self.outside


def rank_memory(job: Job, stage: int, overheads: Overheads | None = None) -> MemoryForecast:
    """Forecast of one rank of a pipeline stage, the same for all its tensor parallel ranks."""
    overheads = overheads or Overheads()
    state = state_bytes(job, stage)
    moment, kept, temporary = max(_moments(job, stage), key=lambda m: m[1] + m[2])
    workspace = overheads.cublas_workspace
    if job.sequence_parallel:
        # Into one buffer, which stays, Megatron gathers the input of every column-parallel linear.
        workspace += job.tokens * job.hidden_size * job.element_size
    tensors = sum(state) + kept + temporary + workspace
    return MemoryForecast(
        stage=stage,
        **state._asdict(),
        activations=kept,
        temporary=temporary,
        moment=moment,
        workspace=workspace,
        outside=overheads.cuda_context + (overheads.nccl if job.world_size > 1 else 0),
        fragmentation=round(overheads.fragmentation * tensors),
    )


def fullest_rank(job: Job, overheads: Overheads | None = None) -> MemoryForecast:
    """Forecast of the pipeline stage that takes most."""
    stages = range(job.pipeline_model_parallel_size)
    return max((rank_memory(job, stage, overheads) for stage in stages), key=lambda m: m.total)


def _moments(job: Job, stage: int) -> list[tuple[str, int, int]]:
    """Name, bytes kept and bytes passing of each moment that may be the worst."""
    chunks = range(job.num_chunks)
    kept_bytes = tuple(activations.chunk_bytes(job, stage, chunk) for chunk in chunks)
    counts = microbatches_in_flight(job, stage, kept_bytes)
    kept = sum(n * size for n, size in zip(counts, kept_bytes, strict=True))
    passing = temporaries.layer(job, stage)
    if is_last(job, stage, job.num_chunks - 1):
        passing |= temporaries.logits(job)
    if is_first(job, stage, 0):
        passing |= temporaries.embedding_backward(job, kept_bytes[0])
    moments = [(name, kept, size) for name, size in passing.items()]
    return [*moments, ("optimizer step", 0, temporaries.optimizer_step(job, stage))]
