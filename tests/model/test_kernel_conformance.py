"""What the check of kernels at start is asked about on a rank."""

import pytest
import torch

from megatron_glm.model import glm_model
from megatron_glm.model.attention.conformance import AttentionSetup
from tests.model.building import build_glm
from tests.ranks import run_ranks

pytest.importorskip("triton")
from megatron_glm.model.fused import conformance  # noqa: E402
from megatron_glm.model.fused.operations import Sizes  # noqa: E402

pytestmark = pytest.mark.ranks


def asked(devices: tuple[str, ...], options: dict) -> list:
    """Arguments with which kernels are checked for a model of this rank."""
    calls = []
    conformance.check_kernels = lambda *arguments, **parts: calls.append((arguments, parts))
    glm_model.DEVICES = devices
    chunks = build_glm(num_layers=1, **options)
    shape = {"micro_batch_size": 3, "seq_length": 48, "max_samples": 5}
    assert glm_model.check_kernel_conformance(chunks, **shape) is chunks
    return calls


def test_widths_are_those_of_the_rank_and_the_length_is_not_the_longest_possible():
    options = {"glm_attention_backend": "chunked", "glm_fused_kernels": False,
               "attention_dropout": 0.1}  # fmt: skip
    for calls in run_ranks(asked, ("cpu",), options, tensor_model_parallel_size=2):
        [(arguments, parts)] = calls
        setup = AttentionSetup("chunked", 3, 48, 2, 16, 5, 0.25, 0.1, torch.float32,
                               torch.device("cpu"))  # fmt: skip
        assert arguments == ((256, 64, 88, 2, 16, 256), setup)
        assert parts == {"with_fused": False, "with_weight_gradient": False}


def test_a_cpu_has_no_kernels():
    assert run_ranks(asked, ("cuda",), {}, world_size=1) == [[]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_this_machines_kernels_are_right(backend, dropout, dtype):
    sizes = Sizes(conformance.NUM_TOKENS, 4096, 10880, 32, 128, 50304)
    setup = AttentionSetup(backend, 2, 2048, 32, 128, 8, 128**-0.5, dropout, dtype,
                           torch.device("cuda"))  # fmt: skip
    conformance.check_kernels(sizes, setup)
