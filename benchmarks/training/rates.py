"""What the device reaches on the parts of a step: the ceilings that steps are compared with.

Variant "products": every product of a step, forward and both backward forms, on buffers of its own
and nothing else. "attention": torch's best causal attention for every layer of a step, forward and
backward. "copy": some copies that no cache holds.
"""

from collections.abc import Callable

import torch

from benchmarks.attention import DTYPES, causal_attention
from benchmarks.timing import COPY_BYTES
from benchmarks.training.turns import Task, Turns
from benchmarks.training.work import Size, products

NUM_COPIES = 10


def run(task: Task, turns: Turns) -> None:
    """Measures until the driver stops it."""
    dtype = DTYPES[task.dtype]
    works = {
        "products": product_work(task.size, dtype, turns.device),
        "attention": attention_work(task.size, dtype, turns.device),
        "copy": copy_work(turns.device),
    }
    while True:
        turns.before_step()
        works[turns.variant]()


def product_work(size: Size, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Every product of a step."""

    def buffer(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    rows = size.micro_batch_tokens
    layers = [
        (each, buffer(rows, each.inputs), buffer(each.outputs, each.inputs) / each.inputs**0.5,
         buffer(rows, each.outputs))
        for each in products(size)
    ]  # fmt: skip

    def work() -> None:
        for product, inputs, weight, gradient in layers:
            for _ in range(product.count * size.num_micro_batches):
                inputs @ weight.T
                gradient @ weight
                gradient.T @ inputs

    return work


def attention_work(size: Size, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Causal attention of every micro-batch and layer of a step."""
    heads, dim = size.num_heads, size.head_dim
    mixed = torch.randn(
        size.seq_length, size.micro_batch_size, heads, 3 * dim, dtype=dtype, device=device,
        requires_grad=True,
    )
    gradient = torch.randn(
        size.seq_length, size.micro_batch_size, heads * dim, dtype=dtype, device=device
    )

    def work() -> None:
        for _ in range(size.num_layers * size.num_micro_batches):
            mixed.grad = None
            out = causal_attention(*mixed.split(dim, dim=-1), None, softmax_scale=dim**-0.5)
            out.backward(gradient)

    return work


def copy_work(device: torch.device) -> Callable[[], None]:
    """NUM_COPIES copies of COPY_BYTES."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def work() -> None:
        for _ in range(NUM_COPIES):
            target.copy_(source)

    return work
