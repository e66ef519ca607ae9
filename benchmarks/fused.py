"""Times the fused kernels against torch's operations: `python -m benchmarks.fused`.

For each size and operation of the layer, forward and both passes: the kernels, torch's operations,
and these under torch.compile. GB/s are those of the bytes that a pass cannot do without, whatever
was moved, beside what a copy on the same device reaches. Prints the table and writes a record.
"""

import patches

patches.apply()

import argparse  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from typing import NamedTuple  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.attention import DTYPES, timed  # noqa: E402
from benchmarks.records import add_run_flags, reason, run_benchmark  # noqa: E402
from megatron_glm.model.dropout import draw_dropout  # noqa: E402
from megatron_glm.model.residual import Sum  # noqa: E402
from megatron_glm.model.rotary import RotaryTable, rotate_query_key  # noqa: E402

EPS, ALPHA = 1e-5, 12.0
VARIANTS = ("fused", "torch", "compiled")
# Bytes of the copy that is the yardstick, larger than any cache.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


class Size(NamedTuple):
    """What one GPU sees of a layer."""

    tokens: int
    hidden: int
    ffn: int
    heads: int
    vocabulary: int


SIZES = {
    "4096": Size(8192, 4096, 10880, 32, 50304),
    "12288": Size(2048, 12288, 32768, 96, 150528),
    "small": Size(256, 128, 352, 4, 1024),
}


class Operation(NamedTuple):
    """Two ways to the same result, and the inputs for both."""

    fused: Callable
    torch: Callable
    leaves: Sequence[Tensor]
    """Arguments of both, whose gradients are taken."""
    elements: int
    """Of the tensor in whose passes over memory the work is counted."""
    forward: int
    """Passes that the forward pass cannot do without."""
    backward: int


Draw = Callable[..., Tensor]


def residual_norm(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.residual_norm import residual_norm

    x, residual = (draw(size.tokens, 1, size.hidden) for _ in range(2))
    bias, weight, norm_bias = (draw(size.hidden) for _ in range(3))
    dropout = draw_dropout(rate, x.device)

    def fused(x, bias, residual, *norm):
        return residual_norm(Sum(x, bias, residual, ALPHA, dropout), *norm, EPS)

    def by_torch(x, bias, residual, weight, norm_bias):
        z = residual + F.dropout(x + bias, rate)
        y = F.layer_norm(z, weight.shape, weight, norm_bias, EPS)
        return y, ALPHA * y

    leaves = (x, bias, residual, weight, norm_bias)
    return Operation(fused, by_torch, leaves, x.numel(), 4, 5)


def residual_sum(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.residual_norm import residual_sum

    x, residual = (draw(size.tokens, 1, size.hidden) for _ in range(2))
    dropout = draw_dropout(rate, x.device)

    def fused(x, bias, residual):
        return residual_sum(Sum(x, bias, residual, ALPHA, dropout))

    def by_torch(x, bias, residual):
        return residual + F.dropout(x + bias, rate)

    return Operation(fused, by_torch, (x, draw(size.hidden), residual), x.numel(), 3, 3)


def layer_norm(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.residual_norm import layer_norm

    leaves = draw(size.tokens, 1, size.hidden), draw(size.hidden), draw(size.hidden)

    def by_torch(x, weight, bias):
        y = F.layer_norm(x, weight.shape, weight, bias, EPS)
        return y, ALPHA * y

    return Operation(
        lambda *leaves: layer_norm(*leaves, EPS), by_torch, leaves, leaves[0].numel(), 2, 4
    )


def bias_geglu(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.geglu import bias_geglu

    leaves = draw(size.tokens, 1, 2 * size.ffn), draw(2 * size.ffn)

    def by_torch(x, bias):
        first, second = (x + bias).chunk(2, dim=-1)
        return F.gelu(first) * second

    return Operation(bias_geglu, by_torch, leaves, leaves[0].numel() // 2, 3, 5)


def rotary(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.rotary import rotate_query_key_

    dim = size.hidden // size.heads
    mixed = draw(size.tokens, 1, size.heads, 3 * dim)
    positions = torch.arange(size.tokens, device=mixed.device)[None]
    rotation = RotaryTable(size.tokens, dim, 10000.0, "fp32")(positions)
    return Operation(
        lambda mixed: rotate_query_key_(mixed, rotation),
        lambda mixed: rotate_query_key(mixed, rotation), (mixed,), mixed.numel() // 3, 4, 6,
    )


def cross_entropy(size: Size, draw: Draw, rate: float) -> Operation:
    from megatron_glm.model.fused.cross_entropy import vocab_parallel_cross_entropy

    logits = draw(size.tokens, 1, size.vocabulary)
    target = torch.randint(size.vocabulary, (size.tokens, 1), device=logits.device)

    def by_torch(logits):
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")

    return Operation(
        lambda logits: vocab_parallel_cross_entropy(logits, target), by_torch, (logits,),
        logits.numel(), 1, 2,
    )


OPERATIONS = {
    function.__name__: function
    for function in (residual_norm, residual_sum, layer_norm, bias_geglu, rotary, cross_entropy)
}


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Time of the device for `step`, without the host's for launching it."""
    if device.type != "cuda":
        return timed(step, device, repeats)
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Kernels wait behind this one, some 10 ms long, until all of them are in the queue.
        torch.cuda._sleep(20_000_000)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_gb_per_s(device: torch.device, repeats: int) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e-6 * source.numel() / milliseconds(lambda: target.copy_(source), device, repeats)


def measure(
    operation: Operation, variant: str, device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of the forward pass and of both, and GB/s of what both must move."""
    function = operation.fused if variant == "fused" else operation.torch
    if variant == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function)
    leaves = operation.leaves
    grads = [torch.randn_like(result) for result in _results(function(*leaves))]

    def both():
        torch.autograd.grad(_results(function(*leaves)), leaves, grads)

    forward_ms = milliseconds(lambda: function(*leaves), device, repeats)
    ms = milliseconds(both, device, repeats)
    moved = operation.elements * leaves[0].element_size() * (operation.forward + operation.backward)
    return {"forward_ms": forward_ms, "ms": ms, "gb_per_s": 1e-6 * moved / ms}


def _results(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each size, operation and variant."""
    device = torch.device(arguments.device)
    yardstick = copy_gb_per_s(device, arguments.repeats)
    yield {"size": "", "operation": "copy", "variant": "torch", "gb_per_s": yardstick}

    def draw(*shape):
        values = torch.randn(shape, device=device, dtype=DTYPES[arguments.dtype])
        return values.requires_grad_()

    for size in arguments.sizes:
        for name in arguments.operations:
            for variant in arguments.variants:
                row = {"size": size, "operation": name, "variant": variant}
                try:
                    operation = OPERATIONS[name](SIZES[size], draw, arguments.dropout)
                    times = measure(operation, variant, device, arguments.repeats)
                except (RuntimeError, ImportError) as error:
                    yield row | {"error": reason(error)}
                    continue
                yield row | times | {"of_copy": times["gb_per_s"] / yardstick}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; sizes, variants and dtype default to what suits the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="layers, by hidden size")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=20)
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    on_gpu = torch.device(arguments.device).type == "cuda"
    arguments.sizes = arguments.sizes or (["4096", "12288"] if on_gpu else ["small"])
    arguments.variants = arguments.variants or (list(VARIANTS) if on_gpu else ["torch"])
    arguments.dtype = arguments.dtype or ("bf16" if on_gpu else "fp32")
    if not on_gpu and set(arguments.variants) != {"torch"}:
        parser.error(f"--device {arguments.device}: only --variants torch runs without a GPU")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    arguments = parse(argv)
    run_benchmark("fused", arguments, run(arguments))


if __name__ == "__main__":
    main()
