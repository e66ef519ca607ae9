"""Do this machine's kernels compute what torch's operations do? Asked at start, in both passes.

A kernel that a compiler, driver or chip of another version gets wrong trains without an error, so
each is compared with its reference: attention at the shape of the run, for which it is compiled,
the others on a few tokens at the widths of the run.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.model.attention import chunked
from megatron_glm.model.attention.backends import OWN_DROPOUT, select_backend
from megatron_glm.model.attention.conformance import AttentionSetup, probe_samples
from megatron_glm.model.dropout import drop_channels, fixed_dropout
from megatron_glm.model.fused.operations import OPERATIONS, Inputs, Operation, Sizes
from megatron_glm.model.weight_gradient import wgrad_gemm_accum_fp32

NUM_TOKENS = 256
"""Tokens enough for a check: more than a tile of any kernel has."""
TF32 = 2e-3
"""`floor` of products, which may be told to run in TF32."""


class KernelConformanceError(GLMError):
    """A kernel that would train the model computes something else than its reference."""


class Check(NamedTuple):
    """A kernel to compare with its reference."""

    operation: Operation
    without: str = "--no-glm-fused-kernels"
    """The flag that trains without the kernel."""
    floor: float = 1e-4
    """Share of the largest element that an error may have in fp32."""


def check_kernels(
    sizes: Sizes,
    attention: AttentionSetup,
    *,
    with_fused: bool = True,
    with_weight_gradient: bool = True,
) -> None:
    """Compare results and gradients of every kernel with its reference in fp32.

    sizes: of what the kernels but attention's get. attention: as the run calls it; its type and
    device are those of every kernel. A backend of OWN_DROPOUT is compared without dropout.
    with_fused, with_weight_gradient: whether the run has the fused kernels, and adds weight
    gradients in the product. An error may be a few roundings of the largest element. Draws from a
    generator of its own.

    Raises:
        KernelConformanceError: names the kernel, what of it is wrong, and the flag to go without.
    """
    draw = _drawing(attention)
    checks = {f"attention backend {attention.backend}": _attention(attention, draw)}
    if with_weight_gradient:
        checks["wgrad_gemm_accum_fp32"] = _weight_gradient(sizes, draw)
    if with_fused:
        dropout = fixed_dropout(0.25, attention.device)
        inputs = Inputs(sizes, draw, dropout, partial(drop_channels, dropout=dropout))
        checks |= {name: Check(make(inputs)) for name, make in OPERATIONS.items()}
    for name, check in checks.items():
        _compare(name, check, attention, draw)


def check_attention_kernel(setup: AttentionSetup) -> None:
    """`check_kernels` of attention alone."""
    draw = _drawing(setup)
    _compare(f"attention backend {setup.backend}", _attention(setup, draw), setup, draw)


def _drawing(setup: AttentionSetup) -> Callable[..., Tensor]:
    """What draws the tensors of a check, of the dtype and on the device of the kernels."""
    generator = torch.Generator(setup.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=setup.device).to(setup.dtype)

    return draw


def _compare(name: str, check: Check, setup: AttentionSetup, draw: Callable) -> None:
    tolerance = max(4 * torch.finfo(setup.dtype).eps, check.floor)
    try:
        fault = _fault(check.operation, draw, tolerance)
    # Whatever stops a kernel, the run can go on without it.
    except Exception as error:
        fault = f"stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if fault is not None:
        raise KernelConformanceError(
            f"kernel {name} on {setup.device} in {setup.dtype} {fault}. Train with "
            f"{check.without}, and report this"
        )


def _attention(setup: AttentionSetup, draw: Callable) -> Check:
    batch, seq_length, dim = setup.batch, setup.seq_length, setup.dim
    samples = probe_samples(batch, seq_length, setup.max_samples).to(setup.device)
    rate = 0.0 if setup.backend in OWN_DROPOUT else setup.dropout_probability
    dropout = fixed_dropout(rate, setup.device)

    def attend(attention, mixed):
        return attention(
            *mixed.split(dim, dim=-1), samples, softmax_scale=setup.softmax_scale, dropout=dropout
        )

    operation = Operation(
        lambda mixed: attend(select_backend(setup.backend, mixed.device.type), mixed),
        # At the length of a run the whole mask may be too large.
        lambda mixed: attend(chunked.attention, mixed),
        (draw(seq_length, batch, setup.heads, 3 * dim),),
    )
    return Check(operation, "another --glm-attention-backend", TF32)


def _weight_gradient(sizes: Sizes, draw: Callable) -> Check:
    def kernel(x, grad):
        main_grad = torch.ones(grad.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
        with torch.no_grad():
            wgrad_gemm_accum_fp32(x, grad, main_grad)
        return main_grad.to(x.dtype)

    # Of a part, since the gradient of a whole matrix may be a GB.
    x, grad = (draw(sizes.tokens, min(sizes.hidden, 1024)) for _ in range(2))
    operation = Operation(kernel, lambda x, grad: 1 + grad.t() @ x, (x, grad))
    return Check(operation, "--no-gradient-accumulation-fusion", TF32)


def _fault(operation: Operation, draw: Callable, tolerance: float) -> str | None:
    actual, inputs = _results(operation.kernel, operation.leaves)
    exact, exact_inputs = _results(operation.by_torch, [x.float() for x in operation.leaves])
    compared = {f"result {i}": pair for i, pair in enumerate(zip(actual, exact, strict=True))}
    if all(out.requires_grad for out in actual):
        grads = [draw(*out.shape) for out in actual]
        torch.autograd.backward(actual, [g.to(x.dtype) for g, x in zip(grads, actual, strict=True)])
        torch.autograd.backward(exact, [g.float() for g in grads])
        compared |= {
            f"gradient {i}": (x.grad, y.grad)
            for i, (x, y) in enumerate(zip(inputs, exact_inputs, strict=True))
        }
    for name, (got, expected) in compared.items():
        error = ((got.float() - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            return f"is wrong: {name} by {error:.2g} of its largest element, {tolerance:.2g} is due"
    return None


def _results(function: Callable, leaves) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    inputs = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    # Copies, since some kernels overwrite what they are given.
    out = function(*(leaf.clone() for leaf in inputs))
    return out if isinstance(out, tuple) else (out,), inputs
