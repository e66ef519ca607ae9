"""A step of Adam on weights in two halves as one pass over memory: 28 bytes a weight.

Main weights beside the model's take 34: their own 28, and 6 to be copied into the model's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_glm.training import split_adam

# Chosen by compiling, untimed: `python -m benchmarks.update` on the machine has the last word.
BLOCK = {"SIZE": 1024, "num_warps": 4}
"""Weights of a program, and its warps."""
HALF, QUIET_NAN = tl.constexpr(split_adam.HALF), tl.constexpr(split_adam.QUIET_NAN)


def step_by_kernel(weight: Tensor, gradient: Tensor, state: dict, group: dict[str, Any]) -> None:
    """What `split_adam.step_by_torch` does; the count of steps is on the host."""
    state["step"] += 1
    step, (beta1, beta2) = int(state["step"]), group["betas"]
    split_adam_step[(triton.cdiv(weight.numel(), BLOCK["SIZE"]),)](
        weight.view(torch.int16), state[split_adam.MAIN_WEIGHT], gradient.contiguous(),
        *(state[name] for name in split_adam.MOMENTS), weight.numel(),
        group["lr"], group["weight_decay"], 1 - beta1, beta2, 1 - beta2, group["eps"],
        group["lr"] / (1 - beta1**step), (1 - beta2**step) ** 0.5,
        DECOUPLED=group["adam_w_mode"], **BLOCK,
    )  # fmt: skip


@triton.jit
def split_adam_step(
    weight_pointer, remainder_pointer, gradient_pointer, first_pointer, second_pointer, num_weights,
    rate, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_of_correction,
    DECOUPLED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE weights; weights as their bits, int16. Grid (blocks of weights,)."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = at < num_weights
    upper = tl.load(weight_pointer + at, mask=mask).to(tl.int32) << 16
    bits = upper + tl.load(remainder_pointer + at, mask=mask).to(tl.int32)
    main = bits.to(tl.float32, bitcast=True)
    gradient = tl.load(gradient_pointer + at, mask=mask).to(tl.float32)
    first = tl.load(first_pointer + at, mask=mask).to(tl.float32)
    second = tl.load(second_pointer + at, mask=mask).to(tl.float32)

    if DECOUPLED:
        main -= rate * decay * main
    else:
        gradient += decay * main
    first += one_minus_beta1 * (gradient - first)
    second = beta2 * second + one_minus_beta2 * gradient * gradient
    main -= step_size * first / (tl.sqrt_rn(second) / root_of_correction + eps)

    bits = tl.where(main == main, main.to(tl.int32, bitcast=True), QUIET_NAN)
    upper = (bits + HALF) >> 16
    tl.store(weight_pointer + at, upper.to(tl.int16), mask=mask)
    tl.store(remainder_pointer + at, (bits - (upper << 16)).to(tl.int16), mask=mask)
    tl.store(first_pointer + at, first.to(first_pointer.dtype.element_ty), mask=mask)
    tl.store(second_pointer + at, second.to(second_pointer.dtype.element_ty), mask=mask)
