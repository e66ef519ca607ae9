"""The Triton kernels under Triton's interpreter, against the reference in fp64.

test_triton.py runs this file in a process of its own: whether kernels are compiled or interpreted
is settled when Triton is imported. The interpreter has no products in bf16.
"""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from megatron_glm.model.attention import triton
from megatron_glm.model.attention.conformance import (
    AttentionSetup,
    MaskConformanceError,
    check_attention,
)
from megatron_glm.model.dropout import Dropout
from tests.model.attention.packs import PACKS, packs, random_inputs, run, samples_from

# Largest element of the error against the largest of the exact result; fp16 rounds at 2**-12.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 6 * 2**-12}
DROPOUT = Dropout(0.3, torch.tensor([20221005, -7], dtype=torch.int32))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks in a short sequence."""
    set_blocks(monkeypatch, 16, 32)


def set_blocks(monkeypatch, queries, keys):
    launch = triton.Launch(queries, keys, num_warps=4, num_stages=1)
    monkeypatch.setattr(triton, "launch_of", lambda *_: launch)


def assert_equals_reference(batch, dtype, dropout, dim, heads=2):
    samples = samples_from(batch)
    mixed, grad = (x.to(dtype) for x in random_inputs(samples, heads, dim))
    exact = run("reference", mixed.double(), grad.double(), samples, dropout)
    for actual, expected in zip(run("triton", mixed, grad, samples, dropout), exact, strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("blocks", [(32, 16), (16, 64)])
def test_a_pack_of_many_blocks(blocks, monkeypatch):
    set_blocks(monkeypatch, *blocks)
    batch = PACKS["unequal, two sequences"][:1]
    assert_equals_reference(batch, torch.float32, DROPOUT, dim=16, heads=1)


@pytest.mark.parametrize("dim", [8, 24, 32])
def test_head_dimensions(dim):
    assert_equals_reference([[(40, 27), (30, 0)]], torch.float32, None, dim)


def test_half_precision():
    assert_equals_reference([[(40, 27), (30, 0)]], torch.float16, DROPOUT, dim=32)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(pack=packs(max_batch=2, max_length=50))
def test_any_pack(pack):
    for dropout in (None, DROPOUT):
        assert_equals_reference(pack[1], torch.float32, dropout, dim=16, heads=1)


def test_conformance():
    def attention(query, key, value, samples):
        return triton.attention(query, key, value, samples, softmax_scale=0.25)

    def wrong(query, key, value, samples):
        return attention(query, key, value, samples * 0 + 40)

    setup = AttentionSetup("triton", 2, 40, 1, 16, 3, 0.25, 0.0, torch.float32, torch.device("cpu"))
    check_attention(attention, setup)
    with pytest.raises(MaskConformanceError):
        check_attention(wrong, setup)


def test_a_context_that_changes_in_place_is_seen():
    samples = samples_from([[(40, 27), (24, 0)]])
    mixed, grad = random_inputs(samples, 1, 16, torch.float32)
    run("triton", mixed, grad, samples)
    samples[0, 0, 0] = 3
    expected, _ = run("reference", mixed, grad, samples)
    torch.testing.assert_close(run("triton", mixed, grad, samples)[0], expected)


def test_double_precision_is_refused():
    mixed, grad = random_inputs(samples_from([[(4, 2)]]), 1, 16)
    with pytest.raises(TypeError, match="float64: must be float32, bfloat16 or float16"):
        run("triton", mixed, grad, samples_from([[(4, 2)]]))
