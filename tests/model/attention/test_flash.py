"""The FlashAttention-4 backend: refusals, and what it gives the kernels, emulated in fp64."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from megatron_glm.errors import GLMError
from megatron_glm.model.attention import flash, half_precision
from megatron_glm.model.attention.backends import load_backend
from megatron_glm.model.dropout import Dropout
from tests.model.attention import emulated_flash_attention
from tests.model.attention.packs import PACKS, packs, random_inputs, run, samples_from

KERNELS = "megatron_glm.model.attention.flash_kernels"
HOPPER, BLACKWELL = (9, 0), (10, 0)


@pytest.fixture(params=[HOPPER, BLACKWELL], ids=["hopper", "blackwell"])
def emulated(request, monkeypatch):
    emulated_flash_attention.install(monkeypatch)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(half_precision, "DTYPES", (torch.float64,))
    monkeypatch.setattr(flash, "_mask", flash._mask.__class__(flash._mask._make))
    flash._kernels.cache_clear()
    yield
    flash._kernels.cache_clear()
    sys.modules.pop(KERNELS, None)


def assert_equals_reference(batch):
    samples = samples_from(batch)
    inputs = random_inputs(samples, heads=2, dim=8)
    pairs = zip(run("flash", *inputs, samples), run("reference", *inputs, samples), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch", PACKS.values(), ids=PACKS)
def test_equals_reference(emulated, batch):
    assert_equals_reference(batch)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pack=packs(max_batch=2, max_length=600))
def test_equals_reference_on_any_pack(emulated, pack):
    assert_equals_reference(pack[1])


def test_output_lies_as_the_layers_want_it(emulated):
    samples = samples_from(PACKS["unequal, two sequences"])
    mixed, grad = random_inputs(samples, heads=2, dim=8)
    out, _ = run("flash", mixed, grad, samples)
    assert out.is_contiguous() and out.shape == grad.shape


def attend(dtype=torch.bfloat16, dim=16, dropout=None):
    query = torch.zeros(4, 1, 1, dim, dtype=dtype)
    samples = samples_from([[(4, 2)]])
    load_backend("flash")(query, query, query, samples, softmax_scale=1.0, dropout=dropout)


@pytest.mark.parametrize(
    "options, message",
    [({"dtype": torch.float32}, "not in torch.float32; pass --bf16 or --fp16"),
     ({"dim": 12}, "head dimension 12 must be a multiple of 8 up to 128"),
     ({"dropout": Dropout(0.1, torch.zeros(2, dtype=torch.int32))},
      "has no dropout; pass --attention-dropout 0 or take another backend")],
)  # fmt: skip
def test_refusals_name_the_backend(options, message):
    with pytest.raises(GLMError, match="--glm-attention-backend flash: .*" + message):
        attend(**options)


def test_an_order_of_sums_is_refused():
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(GLMError, match="flash: sums gradients in any order; drop --determin"):
            attend()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "capability, message",
    [((8, 0), "needs a GPU of compute capability 9, 10 or 11, this one has 8.0; take another"),
     ((12, 0), "needs a GPU of compute capability 9, 10 or 11, this one has 12.0; take another"),
     (HOPPER, r"needs FlashAttention-4 \(.*\); pip install 'flash-attn-4>=")],
)  # fmt: skip
def test_a_machine_that_lacks_something_is_told_what(monkeypatch, capability, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for module in ("flash_attn", "flash_attn.cute", "flash_attn.cute.utils"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, KERNELS, raising=False)
    flash._kernels.cache_clear()
    with pytest.raises(GLMError, match="--glm-attention-backend flash: " + message):
        attend()
