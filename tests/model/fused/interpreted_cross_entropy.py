"""Vocabulary parallel cross entropy under Triton's interpreter, against torch in fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import math

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_glm.model.fused import cross_entropy
from megatron_glm.model.fused.cross_entropy import vocab_parallel_cross_entropy
from tests.ranks import run_ranks

# Of a gradient, times the largest: in 16 bits what its rounding costs; the interpreter truncates
# where it should round to bf16.
TOLERANCES = {torch.float32: 2**-20, torch.float16: 2**-11, torch.bfloat16: 2**-7}
# s, b, v: fewer logits than a block, whole blocks, a rest.
SHAPES = [(3, 2, 50), (2, 1, 128), (5, 1, 333)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in a short vocabulary."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 64)


def inputs(shape, dtype, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits, target, torch.rand(shape[:-1], generator=generator)


def run(logits, target, grad, group=None):
    """Losses and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1, target, group)
    losses.backward(grad)
    return losses.detach(), leaf.grad


def run_exact(logits, target, grad):
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf.flatten(0, 1), target.flatten(), reduction="none")
    losses = losses.view(target.shape)
    losses.backward(grad.double())
    return losses.detach(), leaf.grad


def assert_close(actual, expected, loss_tolerance=1e-5):
    losses, gradient = actual
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-6, atol=loss_tolerance)
    error = (gradient.double() - expected[1]).abs().max()
    assert error <= TOLERANCES[gradient.dtype] * expected[1].abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_passes_equal_torch_in_fp64(shape, dtype):
    case = inputs(shape, dtype)
    assert_close(run(*case), run_exact(*case))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_large_logits(dtype):
    """Their exponentials overflow, and to fp32 their own last digit is 0.001."""
    logits, target, grad = inputs(SHAPES[2], dtype)
    for offset in (1e4, -1e4):
        assert_close(run(logits + offset, target, grad), run_exact(logits + offset, target, grad))
    spread, target, grad = inputs(SHAPES[2], dtype, scale=1e4 / 4)
    assert_close(run(spread, target, grad), run_exact(spread, target, grad))


def test_logits_of_minus_infinity_have_no_part():
    logits, target, grad = inputs(SHAPES[2], torch.float32)
    # The whole first block of a row, and a row's end.
    logits[0, 0, :64], logits[1, 0, 256:] = -math.inf, -math.inf
    target[0, 0], target[1, 0] = 100, 100
    losses, gradient = run(logits, target, grad)
    assert_close((losses, gradient), run_exact(logits, target, grad))
    assert (gradient[0, 0, :64] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_makes_the_loss_nan(bad):
    logits, target, grad = inputs(SHAPES[2], torch.float32)
    logits[1, 0, 200] = bad
    losses, _ = run(logits, target, grad)
    assert losses.isnan().flatten().tolist() == [False, True, False, False, False]


class Allocations(TorchDispatchMode):
    """Storages that torch's operations make while it is active, of `num_bytes` or more."""

    def __init__(self, num_bytes):
        super().__init__()
        self.num_bytes, self.found = num_bytes, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.nbytes >= self.num_bytes:
                if x.data_ptr() not in given:
                    self.found.append((function, x.dtype, tuple(x.shape)))
        return out


def test_nothing_of_the_size_of_the_logits_is_made_or_kept():
    logits, target, grad = inputs(SHAPES[2], torch.float16)
    made = logits.requires_grad_() * 1
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
        Allocations(made.nbytes) as allocations,
    ):
        losses = vocab_parallel_cross_entropy(made, target)
        (gradient,) = torch.autograd.grad(losses, made, grad)
    assert [x.data_ptr() for x in kept if x.nbytes >= made.nbytes] == [made.data_ptr()]
    assert gradient.data_ptr() == made.data_ptr()
    assert allocations.found == []


def test_this_measure_sees_a_copy():
    logits, target, _ = inputs(SHAPES[2], torch.float16)
    with Allocations(logits.nbytes) as allocations:
        F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
    assert (torch.float32, (5, 333)) in [found[1:] for found in allocations.found]


def test_a_second_backward_pass_is_refused():
    logits, target, grad = inputs(SHAPES[0], torch.float32)
    losses = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, target)
    losses.backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward pass again"):
        losses.backward(grad)


def test_who_kept_the_logits_learns_that_they_were_overwritten():
    logits, target, grad = inputs(SHAPES[0], torch.float32)
    made = logits.requires_grad_() * 1
    other = made.square().sum()
    vocab_parallel_cross_entropy(made, target).backward(grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_logits_that_change_between_the_passes_are_an_error():
    logits, target, grad = inputs(SHAPES[0], torch.float32)
    made = logits.requires_grad_() * 1
    losses = vocab_parallel_cross_entropy(made, target)
    with torch.no_grad():
        made.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward(grad)


def test_a_second_derivative_is_refused():
    logits, target, _ = inputs(SHAPES[0], torch.float32)
    leaf = logits.requires_grad_()
    losses = vocab_parallel_cross_entropy(leaf * 1, target)
    (grad,) = torch.autograd.grad(losses.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def parallel_run(shape, dtype, offset):
    """On each rank: losses and this rank's part of the gradient; Megatron's of the same; both of
    a target that no rank has."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy as stock

    cross_entropy.BLOCK = 64
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, grad = inputs(shape, dtype)
    part = (logits + offset).chunk(group.size(), dim=-1)[group.rank()].contiguous()
    results = []
    for ids in (target, torch.full_like(target, -1)):
        leaf = part.clone().requires_grad_()
        losses = stock(leaf * 1, ids, tp_group=group)
        losses.backward(grad)
        results += [run(part, ids, grad, group), (losses.detach(), leaf.grad)]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_two_ranks_equal_torch_in_fp64_and_megatron(dtype):
    shape, offset = (4, 2, 266), 1e4
    logits, target, grad = inputs(shape, dtype)
    expected = run_exact(logits + offset, target, grad)
    ranks = run_ranks(
        parallel_run, shape, dtype, offset, world_size=2, tensor_model_parallel_size=2
    )
    own, stock, own_outside, stock_outside = zip(*ranks, strict=True)
    for losses, _ in own:
        assert_close((losses, torch.cat([gradient for _, gradient in own], -1)), expected)
    for ours, theirs in zip((*own, *own_outside), (*stock, *stock_outside), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
