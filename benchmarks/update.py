"""Times weight gradients and the optimizer's step, fused and not: `python -m benchmarks.update`.

A weight gradient of every matrix of a layer: the product alone, the product and the addition to the
fp32 buffer as Megatron does it without Apex, and both in one. The norm, the clipping and the AdamW
of the weights of --layers layers, bf16 weights with fp32 main weights: in the form that Megatron
falls back on, fused, and with the lower halves of the main weights alone
(--use-precision-aware-optimizer); the time is that of the host too, which the first makes wait.
Prints the table and writes a record.
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
from megatron_glm.training.split_adam import SplitAdam  # noqa: E402

# Bytes a weight of a step: its gradient for the norm and for the scale that clips; the gradient,
# the main weight and two moments of AdamW; the copy of the main weight in bf16, which halves need
# not.
STEP_BYTES = {"fused": 4 + 8 + 28 + 6, "halves": 4 + 8 + 28}


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


def make_step(form: str, weights: list[torch.Tensor]) -> Callable[[], None]:
    """A step of the optimizer on bf16 weights in one of the forms, gradients clipped by 0.5."""
    options = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
    grads = [torch.full(weight.shape, 1e-3, device=weight.device) for weight in weights]
    norm, scale = optimizer.l2_norm, optimizer.scale
    if form == "halves":
        for weight, grad in zip(weights, grads, strict=True):
            weight.decoupled_grad = grad
        adam = SplitAdam(weights, **options)
    else:
        main = [weight.float() for weight in weights]
        for weight, grad in zip(main, grads, strict=True):
            weight.grad = grad
        adam = optimizer.FusedAdam(main, **options)
    if form == "unfused":
        norm, scale = local_multi_tensor_l2_norm, local_multi_tensor_scale
        adam = torch.optim.AdamW(main, **options)

    def step() -> None:
        norm(0, None, [grads], False)[0].item()
        scale(0, None, [grads, grads], 0.5)
        adam.step()
        if form == "fused":
            optimizer.copy(main, weights)
        elif form == "unfused":
            for weight, value in zip(weights, main, strict=True):
                weight.copy_(value)

    return step


def optimizer_step(arguments: argparse.Namespace, size: Sizes, device: torch.device) -> dict:
    """One row: milliseconds of a step of each form."""
    weights = []
    for rows, columns in [*matrices(size).values()] * arguments.layers:
        # A matrix, its bias and a norm's weight and bias.
        for shape in ((rows, columns), (rows,), (columns,), (columns,)):
            weights.append(torch.zeros(shape, device=device, dtype=torch.bfloat16))
    elements = sum(weight.numel() for weight in weights)
    row = {"operation": f"step of {len(weights)} weights"}
    try:
        # One after the other: two states need not fit.
        times = {form: timed(make_step(form, weights), device, arguments.repeats)
                 for form in ("fused", "halves", "unfused")}  # fmt: skip
    except RuntimeError as error:
        return row | {"error": reason(error)}
    return row | {f"{form}_ms": ms for form, ms in times.items()} | {
        "speed_up": times["unfused"] / times["fused"],
        "speed_up_of_halves": times["fused"] / times["halves"],
        "gb_per_s": 1e-6 * elements * STEP_BYTES["fused"] / times["fused"],
        "halves_gb_per_s": 1e-6 * elements * STEP_BYTES["halves"] / times["halves"],
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
    """Neither is slower fused, nor a step on halves than on whole main weights, on a GPU."""
    of_gpu = [row for row in rows if row["size"] not in ("", "small")]
    return [
        Check(f"{name} of the {row['operation']}, {row['size']}", row.get(key), 1.0)
        for key, name in {"speed_up": "speed-up", "speed_up_of_halves": "halves' speed-up"}.items()
        for row in of_gpu
        if key == "speed_up" or row["operation"].startswith("step")
    ]


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
