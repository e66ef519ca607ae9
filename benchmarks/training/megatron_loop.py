"""Megatron's own training loop, made to wait for its turn before every step."""

import patches

patches.apply()

from collections.abc import Callable  # noqa: E402

from megatron.training import training  # noqa: E402
from torch.profiler import record_function  # noqa: E402

from benchmarks.training.components import OPTIMIZER  # noqa: E402
from benchmarks.training.turns import Task, Turns  # noqa: E402

# Nothing but steps: no evaluation, no line of the log, and more steps than anyone waits for.
LOOP = (
    "--train-iters", "10000", "--eval-iters", "0", "--eval-interval", "100000",
    "--log-interval", "100000", "--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "100",
)  # fmt: skip


def size_flags(task: Task) -> list[str]:
    """Size, batch, type and dropout of a task as Megatron's flags."""
    size = task.size
    flags = {
        "--num-layers": size.num_layers,
        "--hidden-size": size.hidden_size,
        "--ffn-hidden-size": size.ffn_hidden_size,
        "--num-attention-heads": size.num_heads,
        "--seq-length": size.seq_length,
        "--max-position-embeddings": size.seq_length,
        "--micro-batch-size": size.micro_batch_size,
        "--global-batch-size": size.num_sequences,
        "--hidden-dropout": task.dropout,
        "--attention-dropout": task.dropout,
    }
    texts = [str(text) for item in flags.items() for text in item]
    return texts if task.dtype == "fp32" else [*texts, f"--{task.dtype}"]


def take_turns(turns: Turns) -> None:
    """Makes Megatron's loop wait for orders, and marks its optimizer for the profiler."""
    step = training.train_step

    def train_step(forward_step, data, model, optimizer, *args, **kwargs):
        if turns.num_parameters is None:
            turns.built(*model)
            optimizer.step = _marked(optimizer.step, turns)
        turns.before_step()
        result = step(forward_step, data, model, optimizer, *args, **kwargs)
        turns.skipped(result[1])
        return result

    training.train_step = train_step


def _marked(step: Callable, turns: Turns) -> Callable:
    def marked_step(*args, **kwargs):
        with turns.part("optimizer"), record_function(OPTIMIZER):
            return step(*args, **kwargs)

    return marked_step
