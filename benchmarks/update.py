"""Times weight gradients and the optimizer's step, fused and not: `python -m benchmarks.update`.

A weight gradient of every matrix of a layer: the product alone, the product and the addition to the
fp32 buffer as Megatron does it without Apex, and both in one. The norm, the clipping and the AdamW
of the weights of --layers layers: in the form that Megatron falls back on, and fused; the time is
that of the host too, which the first makes wait. Prints the table and writes a record.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

import patches

patches.apply()

from megatron.core.utils import (  # noqa: E402
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)

from benchmarks.fused import SIZES  # noqa: E402
from benchmarks.records import Check, add_run_flags, reason, run_benchmark  # noqa: E402
from benchmarks.timing import copy_gb_per_s, timed  # noqa: E402
from megatron_glm.model.fused.operations import Sizes  # noqa: E402
from megatron_glm.model.weight_gradient import wgrad_gemm_accum_fp32  # noqa: E402
from megatron_glm.training import optimizer  # noqa: E402

# Bytes a weight that a step cannot do without: its gradient for the norm and for the scale that
# clips, the weight, the gradient and two moments of AdamW.
STEP_BYTES = 4 + 8 + 28


def matrices(size: Sizes) -> dict[str, tuple[int, int]]:
    """Weights of a layer by name: rows (outputs) and columns (inputs)."""
    return {
        "linear_qkv": (3 * size.hidden, size.hidden),
        "linear_proj": (size.hidden, size.hidden),
        "linear_fc1": (2 * size.ffn, size.hidden),
        "linear_fc2": (size.hidden, size.ffn),
    }


def weight_gradients(arguments: argparse.Namespace, size: Sizes, device: torch.device) -> Iterator:
    """Rows of milliseconds and of what the fused form adds to the product alone."""
    for name, (rows, columns) in matrices(size).items():
        inputs, grad = (
            torch.randn(size.tokens, width, device=device, dtype=torch.bfloat16)
            for width in (columns, rows)
        )
        buffer = torch.zeros(rows, columns, device=device)
        forms = {
            "product": lambda x=inputs, g=grad: g.t() @ x,
            "unfused": lambda x=inputs, g=grad, b=buffer: b.add_(g.t() @ x),
            "fused": lambda x=inputs, g=grad, b=buffer: wgrad_gemm_accum_fp32(x, g, b),
        }
        row = {"operation": f"gradient of {name}"}
        try:
            times = {form: timed(step, device, arguments.repeats, of_device=True)
                     for form, step in forms.items()}  # fmt: skip
        except RuntimeError as error:
            yield row | {"error": reason(error)}
            continue
        work = 2e-9 * size.tokens * rows * columns
        yield row | {f"{form}_ms": ms for form, ms in times.items()} | {
            "speed_up": times["unfused"] / times["fused"], "tflops": work / times["fused"]
        }  # fmt: skip


def steps(weights: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    """A step of the optimizer of each form, its gradients clipped by the factor 0.5."""

    def make(adam: torch.optim.Optimizer, norm: Callable, scale: Callable) -> Callable[[], None]:
        def step() -> None:
            grads = [weight.grad for weight in weights]
            norm(0, None, [grads], False)[0].item()
            scale(0, None, [grads, grads], 0.5)
            adam.step()

        return step

    options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    return {
        "unfused": make(torch.optim.AdamW(weights, **options), local_multi_tensor_l2_norm,
                        local_multi_tensor_scale),
        "fused": make(optimizer.FusedAdam(weights, **options), optimizer.l2_norm, optimizer.scale),
    }  # fmt: skip


def optimizer_step(arguments: argparse.Namespace, size: Sizes, device: torch.device) -> dict:
    """One row: milliseconds of a step of both forms."""
    weights = []
    for rows, columns in [*matrices(size).values()] * arguments.layers:
        # A matrix, its bias and a norm's weight and bias.
        for shape in ((rows, columns), (rows,), (columns,), (columns,)):
            weights.append(torch.nn.Parameter(torch.zeros(shape, device=device)))
            weights[-1].grad = torch.full(shape, 1e-3, device=device)
    elements = sum(weight.numel() for weight in weights)
    row = {"operation": f"step of {len(weights)} weights"}
    try:
        # One after the other: two states need not fit.
        times = {form: timed(steps(weights)[form], device, arguments.repeats)
                 for form in ("fused", "unfused")}  # fmt: skip
    except RuntimeError as error:
        return row | {"error": reason(error)}
    return row | {f"{form}_ms": ms for form, ms in times.items()} | {
        "speed_up": times["unfused"] / times["fused"],
        "gb_per_s": 1e-6 * elements * STEP_BYTES / times["fused"],
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each size and operation, and one of the yardstick."""
    device = torch.device(arguments.device)
    yield {"size": "", "operation": "copy", "gb_per_s": copy_gb_per_s(device, arguments.repeats)}
    for name in arguments.sizes:
        for row in weight_gradients(arguments, SIZES[name], device):
            yield {"size": name} | row
        yield {"size": name} | optimizer_step(arguments, SIZES[name], device)


def judge(rows: list[dict]) -> list[Check]:
    """Neither is slower fused, on a GPU."""
    return [Check(f"speed-up of the {row['operation']}, {row['size']}", row.get("speed_up"), 1.0)
            for row in rows if row["size"] not in ("", "small")]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=device)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="layers, by hidden size",
                        default=["4096", "12288"] if device == "cuda" else ["small"])  # fmt: skip
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    run_benchmark("update", arguments, run(arguments), judge=judge)


if __name__ == "__main__":
    main()
