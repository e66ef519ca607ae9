"""Bytes that pass: what is alive beside kept activations at the moments that may be the worst.

Each is a difference to the moment when the backward pass of a micro-batch begins and everything
that the passes in flight keep is there: what it has already given back counts negative.
tests/planning/test_memory.py lets Megatron's schedule run on tensors without data and compares.
"""

from megatron_glm.planning import activations
from megatron_glm.planning.job import Job
from megatron_glm.planning.parameters import FP32, is_last, optimizer_elements
from megatron_glm.planning.schedule import stage_layers


def layer(job: Job, stage: int) -> dict[str, int]:
    """Moments in the last layer of a stage, in its forward or backward pass: bytes by name."""
    num_layers = stage_layers(job)[stage][-1]
    if num_layers == 0:
        return {}
    made_again = activations.made_again(job)
    kept = activations.whole_layer(job) | dict.fromkeys(made_again, 0)
    hidden, split_hidden = _hidden(job)
    f = job.ffn_hidden_size // job.tensor_model_parallel_size
    ffn = f * job.tokens * job.element_size
    base = activations.recomputed_bytes(job, num_layers)
    if stage:
        # Megatron's schedule holds on to the last gradient that it has sent to the stage before.
        base += split_hidden
    if is_last(job, stage, job.num_chunks - 1):
        base -= sum(activations.logits(job).values())
    if job.pipeline_model_parallel_size == 1:
        # The gradient of the tied weight from the logits waits for that from the embedding.
        base += _weight(job, job.padded_vocab_size // job.tensor_model_parallel_size)
    fused, is_recomputed = job.glm_fused_kernels, job.recompute_granularity == "full"
    of_qkv, of_fc1, of_fc2 = (made_again.get(name, 0) for name in activations.MADE_AGAIN)
    # What is not kept lives until the residual is added, which without kernels is a tensor of its
    # own.
    held = of_fc1 + of_qkv * fused
    moments = {
        "forward of fc2": base + held + of_fc2 + hidden + (not fused) * split_hidden,
        # The output of fc2, without kernels also with its bias, after dropout, and the scaled
        # residual; and the sum of all.
        "forward of a layer": base + held + ((2 if fused else 5) + is_recomputed) * split_hidden,
    }

    # The gradients of the output and of the residual, which are one without kernels, and the
    # recomputed output.
    base += (1 + fused + is_recomputed) * split_hidden
    freed = kept["MLP's dropout mask"]
    gathered = hidden if job.sequence_parallel else 0
    moments["backward of fc2"] = (
        base - freed + of_fc2 + split_hidden + gathered + ffn + _weight(job, f)
    )
    freed += kept["fc2 input"]
    moments["backward of GeGLU"] = base - freed + 3 * ffn
    freed += kept["gelu"] + kept["fc1 output"]
    scattered = split_hidden if job.sequence_parallel else 0
    moments["backward of fc1"] = (
        base - freed + of_fc1 + 2 * ffn + hidden + scattered + _weight(job, 2 * f)
    )
    return moments


def logits(job: Job) -> dict[str, int]:
    """Moments of logits and loss on the last stage."""
    v = job.padded_vocab_size // job.tensor_model_parallel_size
    kept = activations.logits(job)
    hidden, split_hidden = _hidden(job)
    held = split_hidden if job.pipeline_model_parallel_size > 1 else 0
    # Megatron's loss widens the logits, and autograd rounds its gradient; ours overwrites them.
    is_widened = job.element_size < FP32 and not job.glm_fused_kernels
    logits_bytes = v * job.tokens * job.element_size
    freed = kept["logits"] if is_widened else 0
    return {
        "loss": held + (logits_bytes if is_widened else 0),
        "backward of logits": (
            held - freed + (logits_bytes if is_widened else 0) + hidden + _weight(job, v)
        ),
    }


def embedding_backward(job: Job, kept_bytes: int) -> dict[str, int]:
    """The end of the backward pass of a micro-batch on the first stage.

    kept_bytes: of one micro-batch in the first chunk, all given back by then.
    """
    v = job.padded_vocab_size // job.tensor_model_parallel_size
    hidden, _ = _hidden(job)
    # On a stage that has the logits too, theirs is still there.
    num_gradients = 1 if job.pipeline_model_parallel_size > 1 else 2
    return {"backward of embedding": -kept_bytes + hidden + num_gradients * _weight(job, v)}


def optimizer_step(job: Job, stage: int) -> int:
    """Bytes that the optimizer step takes beside the state, all activations being gone: gradients
    widened to fp32 where they are not, and the optimizer does not read them as they are."""
    is_widened = (
        job.element_size < FP32
        and not job.accumulate_allreduce_grads_in_fp32
        and not job.use_precision_aware_optimizer
    )
    return optimizer_elements(job, stage) * FP32 if is_widened else 0


def _hidden(job: Job) -> tuple[int, int]:
    """Bytes of the hidden states of a micro-batch: whole, and as a layer passes them on."""
    whole = job.hidden_size * job.tokens * job.element_size
    return whole, whole // job.tensor_model_parallel_size if job.sequence_parallel else whole


def _weight(job: Job, rows: int) -> int:
    """Bytes of the gradient of a weight of `rows` x h, which autograd makes apart from the buffer.

    With fused accumulation too: Megatron then hands an empty tensor of this size to its hooks.
    """
    return rows * job.hidden_size * job.element_size
