"""The fused optimizer against torch's unfused one, and how many operations a step takes."""

import copy
from collections import Counter

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_glm.training import optimizer
from megatron_glm.training.optimizer import FusedAdam, provide_fused_optimizer
from tests.operations import Operations
from tests.ranks import run_ranks
from tests.training.stepping import Stepping

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 5), (33,), (1,))


def weights(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
            for shape in SHAPES]


def take_steps(adam, num_steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for group in adam.param_groups:
            for weight in group["params"]:
                gradient = torch.randn(weight.shape, generator=generator)
                weight.grad = gradient.to(weight.device, weight.dtype)
        adam.step()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decoupled", [True, False])
def test_steps_are_those_of_torch_in_fp64(decoupled, device):
    exact, fused = weights(torch.float64), weights(torch.float32, device)
    unfused = torch.optim.AdamW if decoupled else torch.optim.Adam
    take_steps(unfused(exact, **OPTIONS, foreach=False), 20)
    take_steps(FusedAdam(fused, adam_w_mode=decoupled, **OPTIONS), 20)
    for weight, expected in zip(fused, exact, strict=True):
        # 20 steps of 1e-2 on values of size 1, each rounded to fp32.
        torch.testing.assert_close(weight.double().cpu(), expected, rtol=0, atol=20 * 2.0**-23)


def test_the_state_of_an_unfused_adam_is_gone_on_from():
    one, other = weights(torch.float32), weights(torch.float32)
    unfused = torch.optim.AdamW(one, **OPTIONS, foreach=False)
    take_steps(unfused, 3)
    resumed = FusedAdam(other, **OPTIONS)
    for weight, trained in zip(other, one, strict=True):
        weight.data.copy_(trained.data)
    resumed.load_state_dict(copy.deepcopy(unfused.state_dict()))
    assert all(group["fused"] for group in resumed.param_groups)
    take_steps(unfused, 3, seed=2)
    take_steps(resumed, 3, seed=2)
    for weight, expected in zip(other, one, strict=True):
        torch.testing.assert_close(weight, expected, rtol=0, atol=2.0**-21)


def test_lists_of_tensors():
    tensors = [weight.detach() for weight in weights(torch.float32)]
    everything = torch.cat([tensor.flatten() for tensor in tensors]).double()
    norm, _ = optimizer.l2_norm(0, None, [tensors], False)
    assert norm.shape == (1,) and norm.item() == pytest.approx(everything.norm().item(), rel=1e-6)
    halves = [torch.zeros_like(tensor, dtype=torch.bfloat16) for tensor in tensors]
    optimizer.copy(tensors, halves)
    assert all(torch.equal(half, x.bfloat16()) for half, x in zip(halves, tensors, strict=True))
    doubled = [torch.zeros_like(tensor) for tensor in tensors]
    optimizer.scale(0, None, [tensors, doubled], 2.0)
    optimizer.scale(0, None, [tensors, tensors], 2.0)
    assert all(torch.equal(x, y) for x, y in zip(doubled, tensors, strict=True))
    assert torch.cat([x.flatten() for x in doubled]).double().equal(2 * everything)


def losses_by_both(dtype: str, distributed: bool) -> list:
    """20 steps with Megatron's fallback and with the fused optimizer, from the same weights."""
    runs = []
    for provide in (lambda: None, provide_fused_optimizer):
        provide()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        run = Stepping(dtype, distributed)
        norms = []
        for _ in range(20):
            changed, grad_norm = run.step()
            assert changed
            norms.append(grad_norm)
        inner = run.optimizer.chained_optimizers[0].optimizer
        runs.append((type(inner).__name__, run.losses, norms))
    return runs


@pytest.mark.ranks
@pytest.mark.parametrize("dtype, distributed, tolerance", [
    ("fp32", False, 1e-6), ("fp32", True, 1e-6), ("bf16", True, 1e-3), ("fp16", False, 1e-3),
])
def test_a_run_is_that_with_the_fallback(dtype, distributed, tolerance):
    """In half precision a last bit of a weight in fp32 can turn into one of 16 bits."""
    (stock, fused), *_ = run_ranks(losses_by_both, dtype, distributed,
                                   world_size=2 if distributed else 1)
    assert (stock[0], fused[0]) == ("AdamW", "FusedAdam")
    assert fused[1] == pytest.approx(stock[1], rel=tolerance)
    assert fused[2] == pytest.approx(stock[2], rel=50 * tolerance)
    assert stock[1][-1] < stock[1][0]


def operations_of_a_step(fused: bool, dtype: str, distributed: bool) -> Counter:
    if fused:
        provide_fused_optimizer()
    run = Stepping(dtype, distributed, num_layers=12)
    run.step()
    run.forward_backward()
    with Operations() as operations:
        run.optimizer.step()
    return operations.counts


@pytest.mark.ranks
@pytest.mark.parametrize("dtype, distributed, most", [
    ("fp32", False, 20), ("bf16", False, 20), ("fp16", False, 30),
])
def test_a_step_of_twelve_layers_takes_few_operations(dtype, distributed, most):
    """None of the 147 parameters costs one of its own: 15, 16 and 23 for 1627, 1774 and 1929."""
    (stock,) = run_ranks(operations_of_a_step, False, dtype, distributed, world_size=1)
    (fused,) = run_ranks(operations_of_a_step, True, dtype, distributed, world_size=1)
    assert stock["_local_scalar_dense"] > 147
    assert fused["_local_scalar_dense"] == (2 if dtype == "fp16" else 1)
    assert fused.total() <= most, fused
