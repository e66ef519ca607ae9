"""A run goes on with another Adam, whichever of the two ways of counting steps each has."""

import copy

import pytest
import torch

from megatron_glm.training.optimizer import FusedAdam, loading_any_state

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class AdamByGroup(torch.optim.Optimizer):
    """AdamW written out, with the groups and states of Transformer Engine's and Apex's."""

    def __init__(self, params, **options):
        super().__init__(params, options | {"bias_correction": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            assert isinstance(step, int) and group["bias_correction"]
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {k: torch.zeros_like(weight) for k in ("exp_avg", "exp_avg_sq")}
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                mean, square = state.values()
                mean += (1 - beta1) * (weight.grad - mean)
                square += (1 - beta2) * (weight.grad**2 - square)
                root = (square / (1 - beta2**step)).sqrt() + group["eps"]
                change = mean / (1 - beta1**step) / root + group["weight_decay"] * weight
                weight -= group["lr"] * change


def new_weights(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (5, 7, 3)]


def groups_of(weights):
    """Two groups, one of them without weight decay, and what Megatron keeps in each."""
    return [
        {"params": weights[:2], "wd_mult": 1.0},
        {"params": weights[2:], "wd_mult": 0.0, "weight_decay": 0.0},
    ]


def take_steps(adam, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in adam.param_groups:
            for weight in group["params"]:
                weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        adam.step()


BY_WEIGHT, BY_GROUP = FusedAdam, loading_any_state(AdamByGroup)


@pytest.mark.parametrize("first", [BY_WEIGHT, BY_GROUP, torch.optim.AdamW])
@pytest.mark.parametrize("second", [BY_WEIGHT, BY_GROUP])
def test_six_steps_by_two_are_six_by_torch_in_fp64(first, second):
    exact, weights = new_weights(torch.float64), new_weights()
    take_steps(torch.optim.AdamW(groups_of(exact), **OPTIONS, foreach=False), range(6))
    one, other = first(groups_of(weights), **OPTIONS), second(groups_of(weights), **OPTIONS)
    take_steps(one, range(3))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    take_steps(other, range(3, 6))
    assert [group["wd_mult"] for group in other.param_groups] == [1.0, 0.0]
    for weight, expected in zip(weights, exact, strict=True):
        # Six steps of 1e-2 on values of size 1, each rounded to fp32.
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=6 * 2.0**-23)


@pytest.mark.parametrize("adam", [BY_WEIGHT, BY_GROUP])
def test_a_state_before_the_first_step_is_loaded(adam):
    fresh, weights = adam(groups_of(new_weights()), **OPTIONS), new_weights()
    other = adam(groups_of(weights), **OPTIONS)
    other.load_state_dict(fresh.state_dict())
    take_steps(other, range(1))


def test_decoupled_weight_decay_stays_decoupled():
    """What Transformer Engine stores does not say which; torch takes silence for L2."""
    weights = new_weights()
    by_group = AdamByGroup(groups_of(weights), **OPTIONS)
    take_steps(by_group, range(1))
    resumed = BY_WEIGHT(groups_of(weights), **OPTIONS)
    resumed.load_state_dict(by_group.state_dict())
    assert all(group["decoupled_weight_decay"] for group in resumed.param_groups)
