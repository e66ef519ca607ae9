"""What one rank holds of the weights, and Megatron's buffers of gradients and optimizer state."""

import math
from typing import NamedTuple

from megatron_glm.planning.job import BYTES, Job
from megatron_glm.planning.schedule import stage_layers

# Of torch's AdamW, fp32 each: two moments, beside fp32 main parameters of 16-bit ones.
FP32 = 4


class Parameter(NamedTuple):
    """A parameter as one tensor parallel rank holds it."""

    name: str
    numel: int
    is_tied: bool = False
    """The word embedding where it has a copy on another stage."""


def layer_parameters(job: Job) -> dict[str, int]:
    """Elements of the parameters of a layer by name, in the order in which Megatron builds them."""
    h, t = job.hidden_size, job.tensor_model_parallel_size
    f, a = job.ffn_hidden_size // t, job.attention_size // t
    return {
        "input_layernorm.weight": h,
        "input_layernorm.bias": h,
        "self_attention.linear_proj.weight": h * a,
        "self_attention.linear_proj.bias": h,
        "self_attention.linear_qkv.weight": 3 * a * h,
        "self_attention.linear_qkv.bias": 3 * a,
        "pre_mlp_layernorm.weight": h,
        "pre_mlp_layernorm.bias": h,
        "mlp.linear_fc1.weight": 2 * f * h,
        "mlp.linear_fc1.bias": 2 * f,
        "mlp.linear_fc2.weight": h * f,
        "mlp.linear_fc2.bias": h,
    }


def chunk_parameters(job: Job, stage: int, chunk: int = 0) -> list[Parameter]:
    """Parameters of a model chunk of a pipeline stage, in the order in which Megatron builds them.

    chunk: of the stage's, in the order in which a micro-batch passes them.
    """
    layer = layer_parameters(job)
    before, behind = _edges(job, stage, chunk)
    return [
        *before,
        *(
            Parameter(f"decoder.layers.{number}.{name}", numel)
            for number in range(stage_layers(job)[stage][chunk])
            for name, numel in layer.items()
        ),
        *behind,
    ]


def _edges(job: Job, stage: int, chunk: int) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters before and behind the layers of a chunk."""
    h, is_split = job.hidden_size, job.pipeline_model_parallel_size > 1
    vocabulary = job.padded_vocab_size // job.tensor_model_parallel_size * h
    before, behind = [], []
    if is_first(job, stage, chunk):
        before.append(Parameter("embedding.word_embeddings.weight", vocabulary, is_split))
    if is_last(job, stage, chunk):
        behind += [Parameter(f"decoder.final_layernorm.{name}", h) for name in ("weight", "bias")]
        if is_split:
            behind.append(Parameter("output_layer.weight", vocabulary, True))
    return before, behind


def is_first(job: Job, stage: int, chunk: int) -> bool:
    """Whether the chunk holds the word embedding."""
    return stage == 0 and chunk == 0


def is_last(job: Job, stage: int, chunk: int) -> bool:
    """Whether the chunk holds the final norm and the logits."""
    return stage == job.pipeline_model_parallel_size - 1 and chunk == job.num_chunks - 1


def parameters_of_rank(job: Job, stage: int) -> int:
    """Number of parameters that a rank of the stage holds."""
    edges = [p for chunk in range(job.num_chunks) for part in _edges(job, stage, chunk)
             for p in part]  # fmt: skip
    layers = sum(stage_layers(job)[stage]) * sum(layer_parameters(job).values())
    return layers + sum(parameter.numel for parameter in edges)


def parameters_of_model(job: Job) -> int:
    """Number of parameters of the whole model, the tied embedding counted once."""
    whole = job.with_(
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1, sequence_parallel=False,
        virtual_pipeline_model_parallel_size=None, decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None, account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )  # fmt: skip
    return parameters_of_rank(whole, 0)


def buffer_numel(job: Job, stage: int, chunk: int = 0) -> int:
    """Elements of the buffer in which Megatron keeps a chunk's gradients.

    The distributed optimizer pads it: parameters start at multiples of 64, buckets end where they
    can be dealt to the data parallel ranks, and the tied embedding has a bucket of its own.
    """
    parameters = chunk_parameters(job, stage, chunk)
    if not job.use_distributed_optimizer:
        return sum(p.numel for p in parameters)
    dp = job.data_parallel_size
    is_bucketed = job.overlap_grad_reduce and stage == 0 and chunk == 0
    bucket_size = max(40_000_000, 1_000_000 * dp) if is_bucketed else math.inf
    bucket_end = math.lcm(dp, 128)
    start = end = 0
    for parameter in reversed(parameters):
        end = _round_up(end, 64)
        if parameter.is_tied and end > start:
            start = end = _round_up(end, bucket_end)
        end += parameter.numel
        if parameter.is_tied or end - start >= bucket_size:
            start = end = _round_up(end, bucket_end)
    return _round_up(end, bucket_end)


class StateBytes(NamedTuple):
    """Bytes of what a rank keeps from step to step."""

    parameters: int
    gradients: int
    optimizer: int


def state_bytes(job: Job, stage: int) -> StateBytes:
    """Bytes of parameters, gradient buffers, and main parameters with the moments of Adam."""
    chunks = range(job.num_chunks)
    numel = parameters_of_rank(job, stage)
    padded = sum(buffer_numel(job, stage, chunk) for chunk in chunks)
    gradient_size = FP32 if job.accumulate_allreduce_grads_in_fp32 else job.element_size
    # Main weights beside 16-bit ones: whole, or the half that these lack.
    main_weight_size = FP32 if job.element_size < FP32 else 0
    if job.has_split_weights:
        main_weight_size -= job.element_size
    return StateBytes(
        # The distributed optimizer gathers parameters in a buffer laid out like the gradients'.
        parameters=(padded if job.use_distributed_optimizer else numel) * job.element_size,
        gradients=padded * gradient_size,
        optimizer=optimizer_elements(job, stage) * (main_weight_size + moments_size(job)),
    )


def moments_size(job: Job) -> int:
    """Bytes of both moments of Adam of a weight."""
    return BYTES[job.exp_avg_dtype] + BYTES[job.exp_avg_sq_dtype]


def optimizer_elements(job: Job, stage: int) -> int:
    """Elements that this rank's optimizer updates."""
    if not job.use_distributed_optimizer:
        return parameters_of_rank(job, stage)
    padded = sum(buffer_numel(job, stage, chunk) for chunk in range(job.num_chunks))
    return padded // job.data_parallel_size


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
