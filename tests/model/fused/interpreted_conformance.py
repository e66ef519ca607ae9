"""The check of kernels at start, under Triton's interpreter: it passes, and sees what is wrong."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch
import torch.nn.functional as F

from megatron_glm.model.attention import backends
from megatron_glm.model.attention.conformance import AttentionSetup
from megatron_glm.model.fused import conformance, cross_entropy, geglu, residual_norm, rotary
from megatron_glm.model.fused.conformance import KernelConformanceError, check_kernels
from megatron_glm.model.fused.operations import Sizes

SIZES = Sizes(tokens=32, hidden=40, ffn=24, heads=2, dim=16, vocab=70)
SETUP = AttentionSetup(
    backend="triton", batch=2, seq_length=40, heads=2, dim=16, max_samples=4, softmax_scale=0.25,
    dropout_probability=0.1, dtype=torch.float32, device=torch.device("cpu"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def triton_on_a_cpu(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", ("cpu",))


def check(**parts):
    check_kernels(SIZES, SETUP, **parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_right_kernels_pass(dtype):
    before = torch.get_rng_state()
    check_kernels(SIZES, SETUP._replace(dtype=dtype))
    assert torch.equal(before, torch.get_rng_state())


def swiglu(x, bias):
    first, second = (x + bias).chunk(2, dim=-1)
    return F.silu(first) * second


def half_gradient(function):
    def wrong(*arguments):
        x, *others = arguments
        return function(x / 2 + x.detach() / 2, *others)

    return wrong


@pytest.mark.parametrize(
    "module, name, wrong, message",
    [
        (geglu, "bias_geglu", swiglu, "bias_geglu .* result 0 .* --no-glm-fused-kernels"),
        (rotary, "rotate_query_key_", half_gradient(rotary.rotate_query_key_), "gradient 0"),
        (residual_norm, "layer_norm", half_gradient(residual_norm.layer_norm), "gradient 0"),
        (cross_entropy, "vocab_parallel_cross_entropy",
         half_gradient(cross_entropy.vocab_parallel_cross_entropy), "cross_entropy .* gradient 0"),
        (conformance, "wgrad_gemm_accum_fp32", lambda x, grad, main_grad: None,
         "result 0 .* --no-gradient-accumulation-fusion"),
        (conformance, "select_backend", lambda *_: lambda q, k, v, *_, **options: q.flatten(2),
         "attention backend triton .* another --glm-attention-backend"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_named(module, name, wrong, message, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(KernelConformanceError, match=message):
        check()


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    def stop(*_):
        raise RuntimeError("PTXAS error: Internal Triton PTX codegen error\nmore")

    monkeypatch.setattr(residual_norm, "residual_sum", stop)
    with pytest.raises(KernelConformanceError, match="stops with RuntimeError: PTXAS .* error. T"):
        check()


def test_what_the_run_goes_without_is_not_asked(monkeypatch):
    monkeypatch.setattr(conformance, "wgrad_gemm_accum_fp32", None)
    monkeypatch.setattr(geglu, "bias_geglu", None)
    check(with_fused=False, with_weight_gradient=False)
