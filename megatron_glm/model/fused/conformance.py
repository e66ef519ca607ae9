"""Do this machine's kernels compute what torch's operations do? Asked at start, in both passes.

A kernel that a compiler, driver or chip of another version gets wrong trains without an error, so
each is compared with its reference: attention at the shape of the run, for which it is compiled,
the others on a few tokens at the widths of the run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.model.attention import chunked
from megatron_glm.model.attention.backends import OWN_DROPOUT, select_backend
from megatron_glm.model.attention.conformance import AttentionSetup, probe_samples
from megatron_glm.model.dropout import Dropout
from megatron_glm.model.residual import Sum
from megatron_glm.model.rotary import RotaryTable, rotate_query_key
from megatron_glm.model.weight_gradient import wgrad_gemm_accum_fp32

NUM_TOKENS = 256
"""Tokens of a check but attention's; more than a tile of any kernel has."""
ALPHA, EPS = 4.0, 1e-5
SEED = (20221005, -7)


class KernelConformanceError(GLMError):
    """A kernel that would train the model computes something else than its reference."""


class Widths(NamedTuple):
    """Sizes of this rank's part of the model: h, f / tp and v / tp."""

    hidden: int
    ffn: int
    vocab: int


class Operation(NamedTuple):
    """A kernel, what it must equal, and tensors to ask both about."""

    kernel: Callable
    by_torch: Callable
    leaves: tuple[Tensor, ...]
    without: str = "--no-glm-fused-kernels"
    """The flag that trains without the kernel."""
    floor: float = 1e-4
    """Share of the largest element that an error may have in fp32."""


TF32 = 2e-3
"""`floor` of products, which may be told to run in TF32."""


def check_kernels(
    widths: Widths,
    attention: AttentionSetup,
    *,
    with_fused: bool = True,
    with_weight_gradient: bool = True,
) -> None:
    """Compare results and gradients of every kernel with its reference in fp32.

    attention: as the run calls it; its heads, type and device are those of every kernel. A backend
    of OWN_DROPOUT is compared without dropout. with_fused, with_weight_gradient: whether the run
    has the fused kernels, and adds weight gradients in the product. An error may be a few roundings
    of the largest element. Draws from a generator of its own.

    Raises:
        KernelConformanceError: names the kernel, what of it is wrong, and the flag to go without.
    """
    dtype, device = attention.dtype, attention.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    operations = {f"attention backend {attention.backend}": _attention(attention, draw)}
    if with_weight_gradient:
        operations["wgrad_gemm_accum_fp32"] = _weight_gradient(widths, draw)
    if with_fused:
        operations |= _fused(widths, attention, draw)
    for name, operation in operations.items():
        tolerance = max(4 * torch.finfo(dtype).eps, operation.floor)
        try:
            fault = _fault(operation, draw, tolerance)
        # Whatever stops a kernel, the run can go on without it.
        except Exception as error:
            fault = f"stops with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if fault is not None:
            raise KernelConformanceError(
                f"kernel {name} on {device} in {dtype} {fault}. Train with {operation.without}, "
                "and report this"
            )


def _fused(widths: Widths, attention: AttentionSetup, draw: Callable) -> dict[str, Operation]:
    from megatron_glm.model.fused.cross_entropy import vocab_parallel_cross_entropy
    from megatron_glm.model.fused.geglu import bias_geglu
    from megatron_glm.model.fused.residual_norm import layer_norm, residual_norm, residual_sum
    from megatron_glm.model.fused.rotary import rotate_query_key_

    h, device = widths.hidden, attention.device
    x, residual = draw(NUM_TOKENS, 1, h), draw(NUM_TOKENS, 1, h)
    mixed = draw(NUM_TOKENS, 1, attention.heads, 3 * attention.dim)
    dropout = _dropout(0.25, device)
    bias, norm = draw(h), (draw(h), draw(h))
    target = torch.arange(NUM_TOKENS, device=device)[:, None] % widths.vocab
    positions = torch.arange(NUM_TOKENS, device=device)[None]
    rotation = RotaryTable(NUM_TOKENS, attention.dim, 10000.0, "fp32")(positions)

    def added(x, bias, residual):
        return Sum(x, bias, residual, ALPHA, dropout)

    def norm_twice(z, weight, norm_bias):
        y = F.layer_norm(z, weight.shape, weight, norm_bias, EPS)
        return y, y

    def geglu(x, bias):
        first, second = (x + bias).chunk(2, dim=-1)
        return F.gelu(first) * second

    return {
        "residual_norm": Operation(
            lambda *leaves: residual_norm(added(*leaves[:3]), *leaves[3:], EPS),
            lambda *leaves: norm_twice(added(*leaves[:3]).by_torch(), *leaves[3:]),
            (x, bias, residual, *norm),
        ),
        "residual_sum": Operation(
            lambda *leaves: residual_sum(added(*leaves)),
            lambda *leaves: added(*leaves).by_torch(), (x, bias, residual),
        ),
        "layer_norm": Operation(
            lambda *leaves: layer_norm(*leaves, EPS), norm_twice, (x, *norm)
        ),
        "bias_geglu": Operation(
            bias_geglu, geglu, (draw(NUM_TOKENS, 1, 2 * widths.ffn), draw(2 * widths.ffn))
        ),
        "rotate_query_key_": Operation(
            lambda mixed: rotate_query_key_(mixed, rotation),
            lambda mixed: rotate_query_key(mixed, rotation), (mixed,),
        ),
        "vocab_parallel_cross_entropy": Operation(
            lambda logits: vocab_parallel_cross_entropy(logits, target),
            lambda logits: F.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="none"
            ).view_as(target),
            (draw(NUM_TOKENS, 1, widths.vocab),),
        ),
    }  # fmt: skip


def _attention(setup: AttentionSetup, draw: Callable) -> Operation:
    batch, seq_length, dim = setup.batch, setup.seq_length, setup.dim
    samples = probe_samples(batch, seq_length, setup.max_samples).to(setup.device)
    rate = 0.0 if setup.backend in OWN_DROPOUT else setup.dropout_probability
    dropout = _dropout(rate, setup.device) if rate else None

    def attend(attention, mixed):
        return attention(
            *mixed.split(dim, dim=-1), samples, softmax_scale=setup.softmax_scale, dropout=dropout
        )

    return Operation(
        lambda mixed: attend(select_backend(setup.backend, mixed.device.type), mixed),
        # At the length of a run the whole mask may be too large.
        lambda mixed: attend(chunked.attention, mixed),
        (draw(seq_length, batch, setup.heads, 3 * dim),),
        "another --glm-attention-backend", TF32,
    )  # fmt: skip


def _weight_gradient(widths: Widths, draw: Callable) -> Operation:
    def kernel(x, grad):
        main_grad = torch.ones(grad.shape[-1], x.shape[-1], dtype=torch.float32, device=x.device)
        with torch.no_grad():
            wgrad_gemm_accum_fp32(x, grad, main_grad)
        return main_grad.to(x.dtype)

    # Of a part, since the gradient of a whole matrix may be a GB.
    x, grad = (draw(NUM_TOKENS, min(widths.hidden, 1024)) for _ in range(2))
    return Operation(
        kernel, lambda x, grad: 1 + grad.t() @ x, (x, grad),
        "--no-gradient-accumulation-fusion", TF32,
    )  # fmt: skip


def _dropout(probability: float, device: torch.device) -> Dropout:
    return Dropout(probability, torch.tensor(SEED, dtype=torch.int32, device=device))


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
