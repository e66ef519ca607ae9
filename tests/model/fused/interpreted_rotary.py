"""Bias and rotary positions in the mixed projection, under Triton's interpreter, against torch in
fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch

from megatron_glm.model.attention.sdpa import attention
from megatron_glm.model.fused import rotary
from megatron_glm.model.fused.rotary import rotate_query_key_
from megatron_glm.model.rotary import RotaryTable, rotate_query_key

NUM_POSITIONS = 2048
# Times the largest of the exact result: what the last rounding may cost. The interpreter truncates
# where it should round to bf16, so that there it may cost twice as much.
TOLERANCES = {torch.float32: 2**-23, torch.float16: 2**-11, torch.bfloat16: 2**-7}
SUM_TOLERANCE = 2**-21
"""At least this for the gradient of the bias: a sum over tokens in fp32."""
# s, b, n, d: tokens and heads that fill no tile, several tiles of heads, halves that are no power
# of two, a single token of one head.
SHAPES = [(5, 2, 3, 16), (3, 1, 20, 128), (4, 3, 5, 24), (1, 1, 1, 2)]


@pytest.fixture(params=[1, 3], ids=["one program", "three programs"])
def programs(request, monkeypatch):
    """Into how many sums of the bias the tokens are split, where there are as many tiles."""
    monkeypatch.setattr(rotary, "num_processors", lambda device: 1)
    monkeypatch.setattr(rotary, "PROGRAMS_PER_PROCESSOR", request.param)
    monkeypatch.setattr(rotary, "TILE", 8 * rotary.TILE)


def inputs(shape, dtype, angle_dtype="fp32"):
    """Mixed projection, bias, rotation by repeating positions, and gradients as attention lays them
    out."""
    seq_length, batch, heads, dim = shape
    torch.manual_seed(0)
    position_ids = torch.randint(NUM_POSITIONS, (batch, seq_length))
    position_ids[:, -1] = position_ids[:, 0]
    rotation = RotaryTable(NUM_POSITIONS, dim, 10000.0, angle_dtype)(position_ids)
    mixed = torch.randn(seq_length, batch, heads, 3 * dim).to(dtype)
    bias = torch.randn(heads * 3 * dim).to(dtype)
    contiguous = torch.randn(seq_length, batch, heads, dim).to(dtype)
    by_head = torch.randn(batch, heads, seq_length, dim).to(dtype).permute(2, 0, 1, 3)
    not_dense = torch.randn(seq_length, batch, dim, heads).to(dtype).mT
    return mixed, bias, rotation, (contiguous, by_head, not_dense)


def run(function, mixed, bias, rotation, grads):
    """Query, key and value, the gradient of `mixed` and, where there is a bias, that of it."""
    leaves = [leaf.clone().requires_grad_() for leaf in (mixed, bias) if leaf is not None]
    out = function(leaves[0] * 1, leaves[1] if len(leaves) == 2 else None, rotation)
    torch.autograd.backward(out, grads)
    return *(x.detach() for x in out), *(leaf.grad for leaf in leaves)


def assert_equals_torch(mixed, bias, rotation, grads):
    exact = run(
        rotate_query_key, mixed.double(), bias if bias is None else bias.double(),
        rotation.double(), [grad.double() for grad in grads],
    )  # fmt: skip
    for actual, expected in zip(
        run(rotate_query_key_, mixed, bias, rotation, grads), exact, strict=True
    ):
        assert actual.dtype == mixed.dtype and actual.shape == expected.shape
        tolerance = TOLERANCES[mixed.dtype]
        if expected.dim() == 1:
            tolerance = max(tolerance, SUM_TOLERANCE)
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("angle_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes_equal_torch_in_fp64(shape, dtype, angle_dtype):
    assert_equals_torch(*inputs(shape, dtype, angle_dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_bias_none_is_added(shape):
    mixed, _, rotation, grads = inputs(shape, torch.float32)
    assert_equals_torch(mixed, None, rotation, grads)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_gradient_of_the_bias_is_summed_over_all_tokens_in_fp32(dtype, programs):
    """Whatever programs share them, and of gradients before they are rounded."""
    mixed, bias, rotation, grads = inputs((13, 3, 3, 24), dtype)
    assert_equals_torch(mixed, bias, rotation, grads)


def test_results_are_closer_to_fp64_than_those_rounded_after_every_operation():
    mixed, bias, rotation, grads = inputs(SHAPES[1], torch.float16)
    exact = rotate_query_key(mixed.double(), bias.double(), rotation.double())[0]
    rounded = rotate_query_key(mixed, bias, rotation)[0]
    fused = rotate_query_key_(mixed.clone(), bias, rotation)[0]
    assert (fused - exact).norm() < 0.65 * (rounded - exact).norm()


def test_nothing_is_copied_and_only_the_rotation_is_kept():
    mixed, bias, rotation, grads = inputs(SHAPES[0], torch.float32)
    leaf = mixed.clone().requires_grad_()
    made = leaf * 1
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        out = rotate_query_key_(made, bias.requires_grad_(), rotation)
    assert [x.data_ptr() for x in kept] == [rotation.data_ptr()]
    storages = {x.untyped_storage().data_ptr() for x in out}
    assert storages == {made.untyped_storage().data_ptr()}


@pytest.mark.parametrize("function, hidden_sizes", [(rotate_query_key_, 3), (rotate_query_key, 5)])
def test_attention_keeps_the_projection_alone(function, hidden_sizes):
    """Beside its output; torch's operations leave rotated copies of query and key to keep."""
    shape = seq_length, batch, heads, dim = 16, 2, 3, 16
    mixed, bias, rotation, _ = inputs(shape, torch.float32)
    samples = torch.tensor([[[9], [seq_length]]], dtype=torch.int32).expand(batch, -1, -1)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    leaf = mixed.requires_grad_()
    made = leaf * 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = attention(*function(made, bias, rotation), samples, softmax_scale=0.25)
    del kept[out.untyped_storage().data_ptr()]
    smaller = batch * seq_length * (heads + 3 * dim) * 4  # log-sum-exp and rotations
    size = batch * seq_length * heads * dim * 4
    assert hidden_sizes * size <= sum(kept.values()) <= hidden_sizes * size + smaller


def test_who_kept_the_projection_learns_that_it_was_overwritten():
    mixed, bias, rotation, grads = inputs(SHAPES[0], torch.float32)
    made = mixed.requires_grad_().exp()
    out = rotate_query_key_(made, bias, rotation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(out, grads)


def test_the_views_must_not_be_changed_in_place():
    mixed, bias, rotation, _ = inputs(SHAPES[0], torch.float32)
    query, _, _ = rotate_query_key_(mixed.requires_grad_() * 1, bias, rotation)
    with pytest.raises(RuntimeError, match="is being modified inplace"):
        query.mul_(2)


def test_a_second_derivative_is_refused():
    mixed, bias, rotation, _ = inputs(SHAPES[0], torch.float32)
    leaf = mixed.requires_grad_()
    query, _, _ = rotate_query_key_(leaf * 1, bias, rotation)
    (grad,) = torch.autograd.grad(query.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
