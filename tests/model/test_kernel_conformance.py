"""What the check of kernels at start is asked about on a rank."""

import pytest
import torch

from megatron_glm.model import glm_model
from megatron_glm.model.fused import conformance
from tests.model.building import build_glm
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def asked(devices: tuple[str, ...], options: dict) -> list:
    """Arguments with which kernels are checked for a model of this rank."""
    calls = []
    conformance.check_kernels = lambda *arguments, **parts: calls.append((arguments, parts))
    glm_model.DEVICES = devices
    chunks = build_glm(num_layers=1, **options)
    assert glm_model.check_kernel_conformance(chunks) is chunks
    return calls


def test_widths_are_those_of_the_rank():
    options = {"glm_attention_backend": "chunked", "glm_fused_kernels": False}
    for calls in run_ranks(asked, ("cpu",), options, tensor_model_parallel_size=2):
        [(arguments, parts)] = calls
        assert arguments == ((64, 88, 2, 16, 256), torch.float32, torch.device("cpu"))
        assert parts == {"attention_backend": "chunked", "with_fused": False,
                         "with_weight_gradient": False}  # fmt: skip


def test_a_cpu_has_no_kernels():
    assert run_ranks(asked, ("cuda",), {}, world_size=1) == [[]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_this_machines_kernels_are_right(backend, dtype):
    widths = conformance.Widths(hidden=4096, ffn=10880, heads=32, dim=128, vocab=50304)
    conformance.check_kernels(widths, dtype, torch.device("cuda"), attention_backend=backend)
