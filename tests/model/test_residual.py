"""The residual connection that is summed up in the norm, in every layout that trains.

Torch's operations stand in for the kernels, whose own tests are in fused/.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_glm.model import deepnorm
from megatron_glm.model.dropout import drop_channels
from megatron_glm.model.fused import residual_norm
from tests.model.building import build_glm
from tests.model.test_glm_model import GOLDEN, LAYOUTS, PP, TP, golden_logits, load_golden_weights
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks


def stand_in_for_kernels() -> list[torch.Tensor]:
    """Has this process do with torch what kernels do; returns the seeds that it will use."""
    seeds = []

    def add_up(terms):
        if terms.dropout is not None:
            seeds.append(terms.dropout.seed)
        return terms.alpha * terms.residual + drop_channels(terms.x + terms.bias, terms.dropout)

    def layer_norm(x, weight, bias, eps):
        y = F.layer_norm(x, weight.shape, weight, bias, eps)
        return y, y

    deepnorm.uses_kernels = lambda *_: True
    residual_norm.residual_sum = add_up
    residual_norm.layer_norm = layer_norm
    residual_norm.residual_norm = lambda terms, *norm: layer_norm(add_up(terms), *norm)
    return seeds


def summed_up_golden_logits(sequence_parallel: bool) -> np.ndarray | None:
    stand_in_for_kernels()
    return golden_logits("fp32", sequence_parallel)


@pytest.mark.parametrize("name", ["one rank", "tp 2 with sequence parallelism", "pp 2 interleaved"])
def test_logits_are_those_of_the_released_code(name):
    layout, sequence_parallel = LAYOUTS[name]
    results = run_ranks(
        summed_up_golden_logits, sequence_parallel,
        world_size=layout.get(TP, 1) * layout.get(PP, 1), **layout,
    )
    expected = np.load(GOLDEN / "cases.npz")["logits"]
    assert np.abs(results[-1] - expected).max() < 1e-4


def train(options: dict) -> dict[str, np.ndarray]:
    """Losses, gradients and seeds of one step with dropout."""
    seeds = stand_in_for_kernels()
    (model,) = build_glm(hidden_dropout=0.2, **options)
    load_golden_weights([model])
    tokens = torch.randint(512, (2, 96), generator=torch.Generator().manual_seed(0))
    samples = torch.tensor([[[40], [96]], [[7], [96]]], dtype=torch.int32)
    losses = model(tokens, torch.arange(96).expand(2, -1), samples, labels=tokens.roll(1))
    losses.sum().backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return found | {"losses": losses.detach().numpy(), "seeds": torch.stack(seeds).numpy()}


def assert_equal(actual: dict, expected: dict, tolerance: float) -> None:
    for name, values in expected.items():
        error = np.abs(actual[name].astype(float) - values).max()
        assert error <= tolerance * np.abs(values).max(), (name, error)


def test_ranks_that_share_hidden_states_drop_the_same():
    (one,) = run_ranks(train, {}, world_size=1)
    first, second = run_ranks(train, {}, world_size=2, **{TP: 2})
    assert len(one["seeds"]) == 8 and len(np.unique(one["seeds"])) == 16
    for rank in (first, second):
        replicated = {
            name: values for name, values in one.items() if values.shape == rank[name].shape
        }
        assert {"losses", "seeds", "decoder.layers.0.pre_mlp_layernorm.weight"} <= set(replicated)
        assert_equal(rank, replicated, 1e-5)


def test_ranks_that_split_the_sequence_drop_their_own():
    first, second = run_ranks(train, {"sequence_parallel": True}, world_size=2, **{TP: 2})
    assert len(np.unique([first["seeds"], second["seeds"]])) == 32


RECOMPUTATIONS = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform",
             "recompute_num_layers": 2},
    "some layers": {"recompute_granularity": "full", "recompute_method": "block",
                    "recompute_num_layers": 3},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


@pytest.mark.parametrize("name", RECOMPUTATIONS)
def test_a_recomputation_drops_the_same(name):
    (exact,) = run_ranks(train, {}, world_size=1)
    (actual,) = run_ranks(train, RECOMPUTATIONS[name], world_size=1)
    seeds = exact.pop("seeds")
    assert_equal(actual, exact, 1e-6)
    assert np.array_equal(np.unique(actual["seeds"]), np.unique(seeds))
