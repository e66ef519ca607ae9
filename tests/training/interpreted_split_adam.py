"""The kernel of SplitAdam under Triton's interpreter, against torch's Adam."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch

from megatron_glm.training.split_adam import MAIN_WEIGHT, MOMENTS, join, split, step_by_torch
from megatron_glm.training.split_adam_kernel import step_by_kernel

GROUP = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def draw(*shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))
    return values.clamp(-3, 3)


def state_of(main, dtype):
    weight, remainder = split(main)
    zeros = {name: torch.zeros_like(main, dtype=dtype) for name in MOMENTS}
    return weight, {"step": torch.zeros(()), MAIN_WEIGHT: remainder, **zeros}


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("count", [1, 1000, 1024, 3001])
def test_steps_are_those_of_torch_in_fp64(count, decoupled, gradients):
    weight, state = state_of(draw(count), torch.float32)
    exact = torch.nn.Parameter(draw(count).double())
    adam = (torch.optim.AdamW if decoupled else torch.optim.Adam)([exact], **GROUP, foreach=False)
    for gradient in draw(5, count).to(gradients):
        step_by_kernel(weight, gradient, state, GROUP | {"adam_w_mode": decoupled})
        exact.grad = gradient.double()
        adam.step()
    assert state["step"] == 5
    # Two roundings a step of values below 4.
    error = join(weight, state[MAIN_WEIGHT]).double() - exact
    assert error.abs().max() <= 5 * 2 * 2**-23
    for name in MOMENTS:
        torch.testing.assert_close(
            state[name].double(), adam.state[exact][name], rtol=2**-20, atol=2**-22
        )


def test_halves_are_split_as_by_torch():
    """Without a gradient and at no rate nothing changes; NaN stays NaN."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    bits[:3] = torch.tensor([0x3F808000, 0x3F818000, 0x7FFFFFFF])
    main = bits.int().view(torch.float32)
    weight, state = state_of(main, torch.float32)
    before = weight.clone(), state[MAIN_WEIGHT].clone()
    group = GROUP | {"adam_w_mode": True, "lr": 0.0}
    step_by_kernel(weight, torch.zeros_like(main), state, group)
    assert weight.view(torch.int16).equal(before[0].view(torch.int16))
    assert state[MAIN_WEIGHT].equal(before[1])


def test_a_gradient_that_is_nan_shows():
    weight, state = state_of(torch.ones(4), torch.float32)
    step_by_kernel(weight, torch.tensor([0.0, torch.nan, torch.inf, 1.0]), state,
                   GROUP | {"adam_w_mode": True})  # fmt: skip
    assert weight.isnan().tolist() == [False, True, True, False]


def test_moments_in_bf16():
    weight, state = state_of(draw(100), torch.bfloat16)
    expected, exact = state_of(draw(100), torch.bfloat16)
    group = GROUP | {"adam_w_mode": True}
    step_by_kernel(weight, draw(1, 100)[0], state, group)
    step_by_torch(expected, draw(1, 100)[0], exact, group)
    assert {state[name].dtype for name in MOMENTS} == {torch.bfloat16}
    for name in MOMENTS:
        # The interpreter truncates to bf16.
        torch.testing.assert_close(state[name], exact[name], rtol=2**-7, atol=0)
