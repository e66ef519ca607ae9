"""Every backend equals the reference in fp64, forward and backward, on any pack."""

from inspect import signature

import pytest
import torch
from hypothesis import given, settings

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import (
    BACKENDS,
    NO_DROPOUT,
    OWN_DROPOUT,
    Attention,
    backends_of,
    load_backend,
    select_backend,
)
from megatron_glm.model.dropout import Dropout, draw_dropout
from tests.model.attention.libraries import skip_without_library
from tests.model.attention.packs import MOST_UNEQUAL, PACKS, packs, random_inputs, run, samples_from

CPU = ["sdpa", "chunked", "flex"]
DROPOUTS = {
    "no dropout": None,
    "dropout 0.1": Dropout(0.1, torch.tensor([12345, -678], dtype=torch.int32)),
    # At this rate whole rows of short samples are dropped.
    "dropout 0.9": Dropout(0.9, torch.tensor([-5, 99], dtype=torch.int32)),
}
# Largest element of the error against the largest of the exact result. bf16 has 8 bits: 2**-9
# for each of a few roundings (of each part, of the merged output, of the gradients' inputs).
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6 * 2**-9, torch.float16: 6 * 2**-12}


def assert_equals_reference(backend, batch, dtype, dropout, heads=3, dim=16, device="cpu"):
    samples = samples_from(batch).to(device)
    mixed, grad = (x.to(device, dtype) for x in random_inputs(samples, heads, dim))
    if dropout is not None:
        dropout = dropout._replace(seed=dropout.seed.to(device))
    exact = run("reference", mixed.double(), grad.double(), samples, dropout)
    for actual, expected in zip(run(backend, mixed, grad, samples, dropout), exact, strict=True):
        assert actual.dtype == dtype
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("backend", CPU)
def test_backend_equals_reference(backend, batch, dtype, dropout):
    assert_equals_reference(backend, batch, dtype, dropout)


@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
@settings(max_examples=20, deadline=None)
@given(pack=packs())
def test_backend_equals_reference_on_any_pack(backend, pack):
    for dropout in DROPOUTS.values():
        assert_equals_reference(backend, pack[1], torch.float32, dropout, heads=2, dim=8)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("batch", PACKS.values(), ids=PACKS)
@pytest.mark.parametrize("backend", backends_of("cuda"))
def test_backend_equals_reference_on_gpu(backend, batch, dtype, dropout):
    if backend == "flex" and dtype != torch.bfloat16 and batch is not PACKS[MOST_UNEQUAL]:
        pytest.skip("takes seconds to compile, and the pack makes no other kernel")
    if backend in OWN_DROPOUT and dropout is not None:
        pytest.skip("drops by a generator of its own (test_cudnn.py)")
    if backend in NO_DROPOUT and dropout is not None:
        pytest.skip("has no dropout")
    if skip_without_library(backend) and dtype == torch.float32:
        pytest.skip("the library has no fp32")
    assert_equals_reference(backend, batch, dtype, dropout, dim=64, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("backend", ["flex", "triton"])
def test_a_step_never_waits_for_the_gpu(backend, rate):
    attention = load_backend(backend)
    mixed = torch.randn(256, 2, 2, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step(context):
        samples = samples_from([[(200, context), (56, 0)], [(256, 3)]]).pin_memory()
        samples = samples.to("cuda", non_blocking=True)
        out = attention(
            *mixed.split(64, dim=-1), samples, softmax_scale=0.125,
            dropout=draw_dropout(rate, samples.device),
        )
        out.sum().backward()

    step(100)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(30)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_takes_what_the_protocol_says(name):
    if name in ("triton", "cudnn"):
        pytest.importorskip("triton")
    _, *due = signature(Attention.__call__).parameters.values()
    actual = signature(load_backend(name)).parameters.values()
    assert [(x.name, x.kind, x.default) for x in actual] == [
        (x.name, x.kind, x.default) for x in due
    ]


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(GLMError, match="--glm-attention-backend fast: unknown; use auto or"):
        load_backend("fast")


def test_what_auto_means_where_nothing_was_timed():
    assert select_backend("auto", "cpu") is load_backend("sdpa")
    assert select_backend("auto", "cuda") is load_backend("triton")
    assert select_backend("reference", "cpu") is load_backend("reference")


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(GLMError, match="flex: runs on cuda and the model is on cpu; use auto or "):
        select_backend("flex", "cpu")
