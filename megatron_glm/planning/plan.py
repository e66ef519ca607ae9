"""A plan: what a job takes on a cluster, and what to know before it is started."""

from dataclasses import dataclass
from functools import cached_property

from megatron_glm.planning.batch_sizes import SMALLEST_BATCH
from megatron_glm.planning.cluster import Cluster
from megatron_glm.planning.job import Job, PlanError
from megatron_glm.planning.memory import GIB, MemoryForecast, Overheads, rank_memory
from megatron_glm.planning.operations import Shares, hardware_operations, model_operations
from megatron_glm.planning.schedule import stage_layers
from megatron_glm.planning.step_time import StepTime, step_time, train_seconds

DAY = 86400.0
TIGHT = 0.05
"""Share of a GPU's memory below which what is left is too little to rely on a forecast."""
LARGE_BUBBLE = 0.10


@dataclass(frozen=True)
class Run:
    """What is to be trained, beside the job."""

    samples: int | None = None
    """Sequences of the whole run; None where it has no end."""
    ramp: tuple[int, int, int] | None = None
    """--rampup-batch-size."""
    shares: Shares = Shares()


@dataclass(frozen=True)
class Plan:
    """A job on a cluster. Raises PlanError where the cluster has another number of GPUs, and where
    the first batches of a ramp are too small for its ranks."""

    job: Job
    cluster: Cluster
    run: Run = Run()
    overheads: Overheads = Overheads()

    def __post_init__(self):
        if self.job.world_size != self.cluster.world_size:
            raise PlanError(
                f"TP x PP x DP = {self.job.world_size} GPUs: --nodes {self.cluster.num_nodes} x "
                f"--gpus-per-node {self.cluster.gpus_per_node} has {self.cluster.world_size}; "
                "change the cluster or the parallel sizes"
            )
        stage_layers(self.job)
        if self.run.ramp and self.run.ramp[0] < self.job.smallest_batch:
            raise PlanError(
                f"--rampup-batch-size {' '.join(map(str, self.run.ramp))}: must begin with at "
                f"least {self.job.smallest_batch}, {SMALLEST_BATCH}; begin with more, or raise "
                "--tensor-model-parallel-size"
            )

    @property
    def rounds_ramp(self) -> bool:
        """Whether some batches of the ramp have to be rounded for the ranks to share them."""
        return any(size % self.job.smallest_batch for size in (self.run.ramp or ())[:2])

    @cached_property
    def memory(self) -> list[MemoryForecast]:
        """Of a rank of every pipeline stage."""
        stages = range(self.job.pipeline_model_parallel_size)
        return [rank_memory(self.job, stage, self.overheads) for stage in stages]

    @cached_property
    def fullest(self) -> MemoryForecast:
        """Of the rank that takes most."""
        return max(self.memory, key=lambda forecast: forecast.total)

    @property
    def memory_share(self) -> float:
        """Share of a GPU's memory that the fullest rank takes."""
        return self.fullest.total / self.cluster.gpu.memory

    @property
    def fits(self) -> bool:
        """Whether every rank has room."""
        return self.memory_share <= 1.0

    @cached_property
    def time(self) -> StepTime:
        """Of a step after the ramp of the batch."""
        return step_time(self.job, self.cluster, self.run.shares)

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.job.global_batch_size * self.job.seq_length / self.time.step

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: every pair of tokens counted, no recomputation."""
        return self._utilization(model_operations(self.job))

    @property
    def hfu(self) -> float:
        """Hardware FLOPs utilization: the same with recomputation."""
        return self._utilization(hardware_operations(self.job))

    @property
    def days(self) -> float | None:
        """To the end of the run, without failures; None where it has no end."""
        if self.run.samples is None:
            return None
        return (
            train_seconds(
                self.job, self.cluster, self.run.shares, self.run.samples, self.run.ramp
            )
            / DAY
        )

    @property
    def warnings(self) -> list[str]:
        """What is wrong with the plan, or not as good as it could be, with the cure."""
        return [text for is_so, text in self._warnings() if is_so]

    def _utilization(self, operations: int) -> float:
        done = operations * self.job.global_batch_size / self.time.step
        return done / self.job.world_size / self.cluster.gpu.peak

    def _warnings(self) -> list[tuple[bool, str]]:
        job, gpu = self.job, self.cluster.gpu
        missing = self.fullest.total - gpu.memory
        t, bubble = job.tensor_model_parallel_size, self.time.bubble / self.time.step
        return [
            (not self.fits,
             f"does not fit: stage {self.fullest.stage} lacks {missing / GIB:.1f} GiB; recompute, "
             "raise --tensor-model-parallel-size or --pipeline-model-parallel-size, or --search"),
            (self.fits and self.memory_share > 1 - TIGHT,
             f"tight: only {-missing / GIB:.1f} GiB are left, less than a forecast can promise"),
            (bubble > LARGE_BUBBLE,
             f"{bubble:.0%} of a step is the pipeline's bubble: {job.num_microbatches} micro-"
             f"batches are few for {job.pipeline_model_parallel_size} stages; raise "
             "--global-batch-size, or interleave with --num-virtual-stages-per-pipeline-rank"),
            (t > self.cluster.gpus_per_node,
             f"--tensor-model-parallel-size {t} spans nodes, whose links are "
             f"{gpu.nvlink / gpu.network:.0f} times slower; keep it at "
             f"{self.cluster.gpus_per_node} or below"),
            (t > 1 and not job.sequence_parallel,
             "--sequence-parallel would save memory and bytes on the links between stages"),
            (job.data_parallel_size > 1 and not job.use_distributed_optimizer,
             "--use-distributed-optimizer would share the optimizer's state among "
             f"{job.data_parallel_size} ranks"),
            (job.data_parallel_size > 1 and self.time.data_links > 0.02 * self.time.step
             and not job.overlap_grad_reduce,
             "--overlap-grad-reduce --overlap-param-gather would hide the exchange of gradients"),
            (job.recompute_granularity == "selective" and job.recompute_modules == ("core_attn",),
             "--recompute-granularity selective recomputes attention, which keeps nothing of size "
             "s x s here: it costs time and saves no memory; drop it or use --recompute-modules "
             "mlp"),
        ]  # fmt: skip
