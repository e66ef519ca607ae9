"""What Megatron's log says of operations, memory and loss scale, as they are in GLM.

Megatron counts an MLP without a gate, 22% too few operations of GLM-130B, and two copies of the
embedding; and it knows no kernels but its own. Of a loss scale it prints one decimal; GLM's is that
of a sum over all targets of a step, and may lie below 0.05.
"""

from argparse import Namespace
from functools import wraps
from typing import Any

from megatron_glm.device import has_gpu
from megatron_glm.planning.job import Job, PlanError, job_from_args
from megatron_glm.planning.memory import MIB, fullest_rank
from megatron_glm.planning.operations import model_operations


def count_as_glm() -> None:
    """Has --log-throughput, --log-progress and the report of theoretical memory count so, and the
    log say the whole loss scale."""
    from megatron.training import training

    training.num_floating_point_operations = operations_of_step
    training.report_theoretical_memory = report_theoretical_memory
    log = training.training_log

    @wraps(log)
    def log_whole_scale(losses, totals, learning_rate, iteration, loss_scale, *args, **kwargs):
        scale = WholeFloat(loss_scale)
        return log(losses, totals, learning_rate, iteration, scale, *args, **kwargs)

    training.training_log = log_whole_scale


class WholeFloat(float):
    """A float that prints all its digits, whatever format is asked for."""

    def __format__(self, _: str) -> str:
        return repr(float(self))


def operations_of_step(args: Namespace, batch_size: int, **_: Any) -> int:
    """Model operations of a step of `batch_size` sequences, those of MFU: all pairs of tokens, all
    logits and nothing recomputed, as in GLM-130B's paper (arXiv 2210.02414, section 2.3)."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
             "padded_vocab_size", "seq_length", "kv_channels")  # fmt: skip
    return batch_size * model_operations(Job(**{name: getattr(args, name) for name in names}))


def report_theoretical_memory(args: Namespace, **_: Any) -> None:
    """Prints the forecast of the fullest rank, in Megatron's words, beside what the allocator has
    taken; nothing on a CPU, for which there is none."""
    if not has_gpu():
        return
    try:
        forecast = fullest_rank(job_from_args(args))
    except PlanError as error:
        print(f"Theoretical memory footprints: {error}", flush=True)
        return
    state = forecast.parameters + forecast.gradients + forecast.optimizer
    print(
        f"Theoretical memory footprints: weight and optimizer={state / MIB:.2f} MB, "
        f"activation={(forecast.allocated - state) / MIB:.2f} MB, "
        f"total={forecast.allocated / MIB:.2f} MB on a rank of stage {forecast.stage}, the fullest "
        f"({forecast.moment})",
        flush=True,
    )
