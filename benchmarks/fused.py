"""Times the fused kernels against torch's operations: `python -m benchmarks.fused`.

For each size and operation of the layer, forward and both passes: the kernels, torch's operations,
and these under torch.compile. GB/s are those of the bytes that a pass cannot do without, whatever
was moved, beside what a copy on the same device reaches. Prints the table and writes a record.
"""

import patches

patches.apply()

import argparse  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import partial  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.attention import DTYPES  # noqa: E402
from benchmarks.records import add_run_flags, reason, run_benchmark  # noqa: E402
from benchmarks.timing import copy_gb_per_s, timed  # noqa: E402
from megatron_glm.model.dropout import draw_dropout  # noqa: E402
from megatron_glm.model.fused.operations import (  # noqa: E402
    OPERATIONS,
    Inputs,
    Operation,
    Sizes,
)

VARIANTS = ("fused", "torch", "compiled")
# What one GPU sees of a layer.
SIZES = {
    "4096": Sizes(8192, 4096, 10880, 32, 128, 50304),
    "12288": Sizes(2048, 12288, 32768, 96, 128, 150528),
    "small": Sizes(256, 128, 352, 4, 32, 1024),
}
# Of each operation the width of the tensor in whose passes over memory the work is counted, and how
# many of them the forward and the backward pass cannot do without.
PASSES = {
    "residual_norm": ("hidden", 4, 5),
    "residual_sum": ("hidden", 3, 3),
    "layer_norm": ("hidden", 2, 4),
    "bias_geglu": ("ffn", 3, 5),
    "rotate_query_key_": ("hidden", 6, 6),
    "vocab_parallel_cross_entropy": ("vocab", 1, 2),
}


def bytes_moved(name: str, sizes: Sizes, dtype: torch.dtype) -> int:
    """What both passes of an operation cannot do without."""
    width, forward, backward = PASSES[name]
    return (forward + backward) * sizes.tokens * getattr(sizes, width) * dtype.itemsize


def measure(
    operation: Operation, variant: str, device: torch.device, repeats: int
) -> dict[str, float]:
    """Milliseconds of the forward pass and of both."""
    function = operation.kernel if variant == "fused" else operation.by_torch
    if variant == "compiled":
        torch._dynamo.reset()
        function = torch.compile(function)
    leaves = operation.leaves
    grads = [torch.randn_like(result) for result in _results(function(*leaves))]

    def both():
        torch.autograd.grad(_results(function(*leaves)), leaves, grads)

    forward_ms = timed(lambda: function(*leaves), device, repeats, of_device=True)
    return {"forward_ms": forward_ms, "ms": timed(both, device, repeats, of_device=True)}


def _results(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each size, operation and variant."""
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    yardstick = copy_gb_per_s(device, arguments.repeats)
    yield {"size": "", "operation": "copy", "variant": "torch", "gb_per_s": yardstick}

    def draw(*shape):
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    dropout = draw_dropout(arguments.dropout, device)
    drop = partial(F.dropout, p=arguments.dropout)
    for size in arguments.sizes:
        for name in arguments.operations:
            moved = bytes_moved(name, SIZES[size], dtype)
            for variant in arguments.variants:
                row = {"size": size, "operation": name, "variant": variant}
                try:
                    operation = OPERATIONS[name](Inputs(SIZES[size], draw, dropout, drop))
                    times = measure(operation, variant, device, arguments.repeats)
                except (RuntimeError, ImportError) as error:
                    yield row | {"error": reason(error)}
                    continue
                speed = 1e-6 * moved / times["ms"]
                yield row | times | {"gb_per_s": speed, "of_copy": speed / yardstick}


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
