"""Time of a training step: products, attention, memory, links, pipeline and optimizer.

Every operation takes its operations or bytes divided by what the cluster reaches of either, one
after the other; communication that runs beside products takes what these leave of it.
"""

from dataclasses import dataclass

from megatron_glm.model.target_rows import NUM_SIZES
from megatron_glm.planning import activations
from megatron_glm.planning.batch_sizes import schedule_of_ramp
from megatron_glm.planning.cluster import Cluster
from megatron_glm.planning.job import Job
from megatron_glm.planning.operations import (
    Shares,
    layer_matrices,
    recomputed_attention_share,
    recomputed_share,
)
from megatron_glm.planning.parameters import (
    FP32,
    is_first,
    is_last,
    moments_size,
    parameters_of_rank,
)
from megatron_glm.planning.schedule import stage_layers


@dataclass(frozen=True)
class Passes:
    """Seconds of one micro-batch on one stage, forward, backward and recomputation together."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    """Operations bound by memory, and accumulation of weight gradients."""
    tensor_links: float = 0.0
    """Communication of tensor parallelism that nothing hides."""
    pipeline_links: float = 0.0
    host: float = 0.0
    """What launching kernels and waiting for neighbours takes beyond all that."""

    @property
    def total(self) -> float:
        """Sum of all."""
        return (
            self.products + self.attention + self.memory + self.tensor_links
            + self.pipeline_links + self.host
        )  # fmt: skip

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def __mul__(self, factor: float) -> "Passes":
        return Passes(*(factor * value for value in _values(self)))


def _values(passes: Passes) -> tuple[float, ...]:
    return (passes.products, passes.attention, passes.memory, passes.tensor_links,
            passes.pipeline_links, passes.host)  # fmt: skip


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `step` is the sum of the rest."""

    passes: Passes
    """Of all micro-batches on the slowest stage."""
    bubble: float
    """In which that stage waits for the others."""
    data_links: float
    """Reduction of gradients and gathering of parameters that nothing hides."""
    optimizer: float

    @property
    def step(self) -> float:
        """The whole step."""
        return self.passes.total + self.bubble + self.data_links + self.optimizer


def step_time(job: Job, cluster: Cluster, shares: Shares) -> StepTime:
    """Forecast of a step after the ramp of the batch."""
    p = job.pipeline_model_parallel_size
    # Between the first and the last, all stages are alike.
    stages = range(p) if p <= 3 else (0, 1, p - 1)
    layer = layer_passes(job, cluster, shares)
    each = {stage: stage_passes(job, cluster, stage, layer, shares) for stage in stages}
    slowest = max(each.values(), key=lambda passes: passes.total)
    all_stages = sum(each[stage].total for stage in stages)
    all_stages += (p - len(each)) * each[min(1, p - 1)].total
    return StepTime(
        passes=slowest * job.num_microbatches,
        # Until the first micro-batch has come through, and while the last goes back, one chunk at
        # a time: the fill and drain of 1F1B.
        bubble=(all_stages - slowest.total) / job.num_chunks,
        data_links=max(data_links(job, cluster, stage, each[stage].total) for stage in stages),
        optimizer=max(optimizer_seconds(job, cluster, stage) for stage in stages),
    )


def layer_passes(job: Job, cluster: Cluster, shares: Shares) -> Passes:
    """One layer on one rank, one micro-batch."""
    t, tokens, e = job.tensor_model_parallel_size, job.tokens, job.element_size
    weights = sum(inputs * outputs for inputs, outputs in layer_matrices(job)) // t
    products = 2 * tokens * weights * (3 + recomputed_share(job)) / cluster.product_rate
    pairs = tokens * job.seq_length * shares.visible
    # The backward pass of a kernel that keeps no scores computes them again: 2.5 times forward.
    attention_passes = 3.5 + recomputed_attention_share(job)
    attention = 4 * pairs * job.attention_size / t * attention_passes / cluster.attention_rate
    forward, backward = _memory_bytes(job)
    moved = forward * (1 + recomputed_share(job)) + backward + _made_again(job)
    memory = (moved * e + weights * _accumulation_bytes(job)) / cluster.memory_rate
    busy = products + attention + memory
    return Passes(
        products=products,
        attention=attention,
        memory=memory,
        tensor_links=_tensor_links(job, cluster),
        host=max(0.0, cluster.efficiency.host_seconds_per_layer - busy),
    )


def _memory_bytes(job: Job) -> tuple[float, float]:
    """Elements read and written between the products of a layer, forward and backward, by a rank.

    With kernels each operation reads its inputs and writes its outputs once. Without, Megatron
    compiles bias, dropout and residual together; GeGLU and rotary positions are one pass an
    operation.
    """
    t = job.tensor_model_parallel_size
    tokens = job.tokens
    h = job.hidden_size / (t if job.sequence_parallel else 1)
    a, f = job.attention_size / t, job.ffn_hidden_size / t
    if job.glm_fused_kernels:
        # The first norm 2 h, residual and second norm 4 h, last residual 3 h; bias and rotation of
        # query, key and value 6 a; GeGLU 3 f.
        forward = 9 * h + 6 * a + 3 * f
        # Their gradients 4 + 5 + 3 h and the sums of two gradients 6 h; 6 a; 5 f.
        backward = 18 * h + 6 * a + 5 * f
    else:
        # Norms and scaled residuals 8 h, bias, dropout and sum 6 h; 6 a and 24 a; 9 f.
        forward = 14 * h + 30 * a + 9 * f
        backward = 26 * h + 45 * a + 17 * f
    return forward * tokens, backward * tokens


def _made_again(job: Job) -> float:
    """Elements read and written to make inputs of linears again: a norm's rows in and out, GeGLU's
    two halves in and one out, without kernels by way of one more."""
    names = activations.made_again(job)
    passes = {"linear_qkv input": 2, "fc1 input": 2, "fc2 input": 3 if job.glm_fused_kernels else 5}
    return sum(passes[name] * size / job.element_size for name, size in names.items())


def _accumulation_bytes(job: Job) -> int:
    """Bytes an element to add a weight's gradient to the buffer: read and written in place."""
    return 2 * (FP32 if job.accumulate_allreduce_grads_in_fp32 else job.element_size)


def _tensor_links(job: Job, cluster: Cluster) -> float:
    """Seconds of a layer's collectives that wait for each other and the products.

    Forward, a layer reduces hidden states twice, or under sequence parallelism gathers and
    scatters them twice, which is as many bytes. Backward, what gathers gradients waits; what
    reduces those of the columns goes beside the weights' gradients.
    """
    one_way = _one_way(job, cluster)
    forward = 4 * one_way * (1 + recomputed_share(job))
    return forward + (2 * one_way if job.sequence_parallel else 0.0)


def _one_way(job: Job, cluster: Cluster) -> float:
    """Seconds to gather hidden states over tensor parallel ranks, or to scatter them."""
    t = job.tensor_model_parallel_size
    hidden = job.tokens * job.hidden_size * job.element_size
    return hidden * (t - 1) / t / cluster.link_rate(t)


def stage_passes(job: Job, cluster: Cluster, stage: int, layer: Passes, shares: Shares) -> Passes:
    """One micro-batch on all chunks of a stage. layer: of one layer."""
    passes = layer * sum(stage_layers(job)[stage])
    for chunk in range(job.num_chunks):
        passes += _between_chunks(job, cluster)
        if is_last(job, stage, chunk):
            passes += logits_passes(job, cluster, shares)
        if is_first(job, stage, chunk):
            passes += _embedding_passes(job, cluster)
    return passes


def logits_passes(job: Job, cluster: Cluster, shares: Shares) -> Passes:
    """Logits and loss of the targets of one micro-batch."""
    t, e, h = job.tensor_model_parallel_size, job.element_size, job.hidden_size
    # In sixteenths of a micro-batch, up to which their number is rounded.
    targets = job.tokens * min(1.0, shares.targets + 0.5 / NUM_SIZES)
    v = job.padded_vocab_size // t
    # The loss reads the logits, and reads them again to write their gradient; without kernels it
    # works on a copy in fp32 in seven passes. Hidden states are selected, their gradients spread
    # over zeros. The gradient of the tied weight is written, shrunk and added.
    loss = 3 * e if job.glm_fused_kernels else 2 * e + 7 * FP32
    moved = targets * v * loss + (4 * targets + job.tokens) * h * e
    gradient = 4 * e + _accumulation_bytes(job)
    return Passes(
        products=6 * targets * v * h / cluster.product_rate,
        memory=(moved + v * h * gradient) / cluster.memory_rate,
        # Backward, the reduction goes beside the weight's gradient.
        tensor_links=_one_way(job, cluster) if job.sequence_parallel else 0.0,
    )


def _embedding_passes(job: Job, cluster: Cluster) -> Passes:
    """Its gradient is a whole matrix, which is zeroed, shrunk and added."""
    weights = job.padded_vocab_size // job.tensor_model_parallel_size * job.hidden_size
    moved = weights * (4 * job.element_size + _accumulation_bytes(job))
    return Passes(memory=moved / cluster.memory_rate)


def _between_chunks(job: Job, cluster: Cluster) -> Passes:
    """Activations from the chunk before and gradients from the one behind, which 1F1B waits for.
    Under interleaving they travel beside the passes (--overlap-p2p-communication, the default)."""
    p = job.pipeline_model_parallel_size
    if p == 1:
        return Passes()
    waiting = 2 * cluster.efficiency.host_seconds_per_pass
    if job.num_chunks > 1:
        return Passes(host=waiting)
    split = job.tensor_model_parallel_size if job.sequence_parallel else 1
    hidden = job.tokens * job.hidden_size * job.element_size / split
    # Neighbours are a whole stage of ranks apart.
    rate = cluster.link_rate(job.world_size // p + 1)
    return Passes(pipeline_links=2 * hidden / rate, host=waiting)


def data_links(job: Job, cluster: Cluster, stage: int, micro_batch: float) -> float:
    """Seconds of reducing gradients and gathering parameters over data parallel ranks.

    micro_batch: seconds of all passes of one micro-batch; what is overlapped hides behind the
    backward pass of the last and the forward pass of the first.
    """
    dp, t = job.data_parallel_size, job.tensor_model_parallel_size
    if dp == 1:
        return 0.0
    rate = cluster.link_rate(dp * t)
    numel = parameters_of_rank(job, stage)
    gradient_size = FP32 if job.accumulate_allreduce_grads_in_fp32 else job.element_size
    share = (dp - 1) / dp
    scatter, gather = (share * numel * size / rate for size in (gradient_size, job.element_size))
    if not job.use_distributed_optimizer:
        gather = share * numel * gradient_size / rate
    hidden_scatter = micro_batch * 2 / 3 if job.overlap_grad_reduce else 0.0
    hidden_gather = micro_batch / 3 if job.overlap_param_gather else 0.0
    if not job.use_distributed_optimizer:
        return max(0.0, scatter + gather - hidden_scatter)
    return max(0.0, scatter - hidden_scatter) + max(0.0, gather - hidden_gather)


def optimizer_seconds(job: Job, cluster: Cluster, stage: int) -> float:
    """Seconds to zero and scale the gradients, take their norm and update this rank's weights."""
    gradient_size = FP32 if job.accumulate_allreduce_grads_in_fp32 else job.element_size
    numel = parameters_of_rank(job, stage)
    own = numel / job.data_parallel_size if job.use_distributed_optimizer else numel
    # Zeroed; divided by the number of targets, read and written.
    buffers = 3 * gradient_size * numel
    # Norm; clipping, read and written; gradient read; weight, whole or as halves, and moments read
    # and written.
    update = own * (4 * FP32 + 2 * (FP32 + moments_size(job)))
    if job.element_size < FP32 and not job.has_split_weights:
        # The 16-bit weight is copied from the main weight.
        update += own * (FP32 + job.element_size)
    return (buffers + update) / cluster.memory_rate


def train_seconds(
    job: Job,
    cluster: Cluster,
    shares: Shares,
    samples: int,
    ramp: tuple[int, int, int] | None = None,
) -> float:
    """Seconds to train on so many sequences.

    ramp: --rampup-batch-size: first batch size, increment, and sequences until the last.
    """
    schedule = [(0, job.global_batch_size)]
    if ramp is not None:
        schedule = schedule_of_ramp(*ramp, job.global_batch_size, job.smallest_batch)
    ends = [*(begin for begin, _ in schedule[1:]), samples]
    seconds = 0.0
    for (begin, size), end in zip(schedule, ends, strict=True):
        consumed = max(min(end, samples) - begin, 0)
        step = step_time(job.with_(global_batch_size=size), cluster, shares).step
        seconds += consumed / size * step
    return seconds
