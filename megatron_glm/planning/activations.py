"""Bytes that autograd keeps of a micro-batch for the backward pass, tensor by tensor.

Counted by storage, as on a GPU: a view keeps the whole tensor that it looks into, a tensor that
two operations keep counts once. tests/planning/test_activations.py counts what autograd really
keeps and compares.
"""

from megatron_glm.planning.job import Job
from megatron_glm.planning.parameters import is_first, is_last
from megatron_glm.planning.schedule import stage_layers

FP32, INT32, INT64, BOOL = 4, 4, 8, 1

Kept = dict[str, int]
"""Bytes by tensor."""

RECOMPUTED = {
    "core_attn": ("log-sum-exp", "both passes of FlexAttention"),
    "mlp": ("fc1 output", "gelu", "fc2 input"),
}
"""What no longer is kept under a module of --recompute-modules. The attention kernels keep nothing
of size s x s, so that core_attn saves next to nothing."""
MADE_AGAIN = ("linear_qkv input", "fc1 input", "fc2 input")
"""What linears no longer keep under --glm-recompute-norms-and-geglu."""


def _sizes(job: Job) -> tuple[int, int, int, int, int]:
    """Bytes of one element for every token; the same where sequence parallelism splits tokens; and
    the widths of heads, FFN and hidden size that a rank computes."""
    t = job.tensor_model_parallel_size
    everywhere = job.tokens * job.element_size
    split = everywhere // t if job.sequence_parallel else everywhere
    return everywhere, split, job.attention_size // t, job.ffn_hidden_size // t, job.hidden_size


def _mask_bytes(job: Job) -> int:
    _, split_tokens, _, _, h = _sizes(job)
    return split_tokens // job.element_size * h * BOOL if job.hidden_dropout else 0


def whole_layer(job: Job) -> Kept:
    """Bytes kept of one layer where nothing is recomputed."""
    tokens, split_tokens, a, f, h = _sizes(job)
    heads = job.num_attention_heads // job.tensor_model_parallel_size
    statistics = 2 * split_tokens // job.element_size * FP32
    # The kernels turn queries and keys in place, draw masks again from their seeds, and compute
    # GeGLU again from its input.
    if_unfused = 0 if job.glm_fused_kernels else 1
    mask = _mask_bytes(job) * if_unfused
    # Its dropout needs a second pass: two outputs before the one that is scaled by four words.
    is_twice = job.glm_attention_backend == "flex" and job.attention_dropout
    both_passes = 2 * a * tokens + 4 * heads * job.tokens * FP32
    return {
        "input norm's input": h * split_tokens,
        "input norm's statistics": statistics,
        "linear_qkv input": h * split_tokens,
        "rotation": job.head_size * tokens * if_unfused,
        "query, key and value": 3 * a * tokens,
        "rotated query and key": 2 * a * tokens * if_unfused,
        "log-sum-exp": heads * job.tokens * FP32,
        "both passes of FlexAttention": both_passes if is_twice else 0,
        "linear_proj input": a * tokens,
        "attention's dropout mask": mask,
        "MLP norm's input": h * split_tokens,
        "MLP norm's statistics": statistics,
        "fc1 input": h * split_tokens,
        "fc1 output": 2 * f * tokens,
        "gelu": f * tokens * if_unfused,
        "fc2 input": f * tokens,
        "MLP's dropout mask": mask,
    }


def layer(job: Job) -> Kept:
    """Bytes kept of one layer where not all of it is recomputed."""
    kept = whole_layer(job)
    return kept | dict.fromkeys([*_recomputed(job), *made_again(job)], 0)


def made_again(job: Job) -> Kept:
    """Bytes of what is made for the backward pass of a linear alone, and given back behind it."""
    if not job.glm_recompute_norms_and_geglu:
        return {}
    kept = whole_layer(job)
    # The recomputation of the whole MLP keeps what it begins with.
    is_given = "fc2 input" in _recomputed(job)
    return {name: kept[name] for name in MADE_AGAIN if not (is_given and name == "fc1 input")}


def _recomputed(job: Job) -> list[str]:
    """What is not kept under selective recomputation."""
    modules = job.recompute_modules if job.recompute_granularity == "selective" else ()
    return [name for module in modules for name in RECOMPUTED[module]]


def checkpoint(job: Job) -> int:
    """Bytes of the input of a fully recomputed group of layers."""
    _, split_tokens, _, _, h = _sizes(job)
    if job.distribute_saved_activations:
        return h * split_tokens // job.tensor_model_parallel_size
    return h * split_tokens


def embedding(job: Job) -> Kept:
    """Bytes that the word embedding keeps beside the hidden states that go into the first layer."""
    return {
        "token ids": job.tokens * INT64,
        "embedding's dropout mask": _mask_bytes(job),
    }


def logits(job: Job) -> Kept:
    """Bytes that final norm, logits and loss keep of a micro-batch in which every token is a
    target, the most that there may be; most have half as many."""
    tokens, split_tokens, _, _, h = _sizes(job)
    v = job.padded_vocab_size // job.tensor_model_parallel_size
    # Megatron's loss keeps the softmax, ours the logits that it came from, and two sums of each.
    loss = job.element_size if job.glm_fused_kernels else FP32
    sums = 3 * FP32 if job.glm_fused_kernels else BOOL
    return {
        "final norm's input": h * split_tokens,
        "final norm's statistics": 2 * split_tokens // job.element_size * FP32,
        "targets' hidden states": h * tokens,
        "logits": v * job.tokens * loss,
        "targets": job.tokens * (2 * INT64 + sums),
    }


def chunk_bytes(job: Job, stage: int, chunk: int) -> int:
    """Bytes that a model chunk keeps of one micro-batch."""
    num_layers = stage_layers(job)[stage][chunk]
    checkpoints, whole_layers = _checkpoints(job, num_layers)
    kept = layer(job)
    total = checkpoints * checkpoint(job) + whole_layers * sum(kept.values())
    if checkpoints or (whole_layers and job.glm_fused_kernels):
        # One rotation for all layers, which without kernels each of them rounds for itself.
        total += job.head_size * job.tokens * FP32
    if whole_layers and kept["log-sum-exp"]:
        # Which keys a query sees and which queries see a key, the same for all layers.
        total += 4 * INT32 * job.tokens
    if is_first(job, stage, chunk):
        total += sum(embedding(job).values())
    if is_last(job, stage, chunk):
        total += sum(logits(job).values())
    return total


def _checkpoints(job: Job, num_layers: int) -> tuple[int, int]:
    """Of consecutive layers: groups of which only the input is kept, and layers kept whole."""
    if job.recompute_granularity != "full":
        return 0, num_layers
    group = job.recompute_num_layers or 1
    if job.recompute_method == "block":
        return min(group, num_layers), max(num_layers - group, 0)
    return -(-num_layers // group), 0


def recomputed_bytes(job: Job, num_layers: int) -> int:
    """Bytes that come back when the backward pass recomputes, beyond those kept when it begins.

    num_layers: of the chunk, whose last layers are recomputed first.
    """
    whole, group = whole_layer(job), job.recompute_num_layers or 1
    every = sum(whole.values())
    if job.recompute_granularity is None:
        return 0
    if job.recompute_granularity == "selective":
        return sum(whole[name] for name in {*_recomputed(job)} - {*made_again(job)})
    # The input of what is recomputed is kept already.
    given = whole["input norm's input"]
    if job.recompute_method == "block":
        # The first layers are recomputed, each by itself; where there are others, these have given
        # back what they kept by then.
        return every - given if group >= num_layers else 0
    last = num_layers % group or group
    first_whole = group * every - given - (checkpoint(job) if last < group else 0)
    return max(last * every - given, first_whole)
