"""Megatron's random states are those of the GPU; without one they are the CPU generator's."""

import logging
from typing import Any

import torch

from patches.patch import Patch, Target, constant

TRACKER_LOG = "megatron.core.tensor_parallel.random"


def get_rng_state(device: object = "cuda") -> torch.Tensor:
    """State of the CPU generator."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: object = "cuda") -> None:
    """Set the state of the CPU generator."""
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the CPU generator."""
    torch.default_generator.manual_seed(seed)


def megatron_get(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    """State of the CPU generator; `clone` and `graph_safe` are for CUDA graphs."""
    return get_rng_state()


def megatron_set(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
    """Set the state of the CPU generator at once."""
    set_rng_state(new_state)


def silence_warning(original: Any) -> Any:
    """The tracker warns whenever the CPU generator moves inside it, which is now its purpose."""
    logging.getLogger(TRACKER_LOG).addFilter(
        lambda record: "CPU RNG state changed within GPU RNG context" not in record.getMessage()
    )
    return original


def reproduces() -> bool:
    """True where setting a random state has no effect on the next dropout mask."""
    from megatron.core.tensor_parallel import random

    state = torch.default_generator.get_state()
    first = torch.rand(4)
    random._set_cuda_rng_state(state)
    return not torch.equal(first, torch.rand(4))


PATCH = Patch(
    reason="without a GPU the calls are queued for the day one appears: dropout differs between "
    "a forward pass and its recomputation, in silence",
    upstream="not reported",
    versions={"torch": "==2.11.*", "megatron-core": "==0.19.*"},
    when="no GPU",
    targets=(
        Target(
            "torch.cuda:get_rng_state",
            "1190f97901d79384",
            constant(get_rng_state),
            also=("torch.cuda.random:get_rng_state",),
        ),
        Target(
            "torch.cuda:set_rng_state",
            "2aaed350f20b8569",
            constant(set_rng_state),
            also=("torch.cuda.random:set_rng_state",),
        ),
        Target(
            "torch.cuda:manual_seed",
            "a71497712eba81c9",
            constant(manual_seed),
            also=("torch.cuda.random:manual_seed",),
        ),
        Target(
            "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
            "aa26caaa069c5c4f",
            constant(megatron_get),
        ),
        Target(
            "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
            "b179c9d95438b61c",
            constant(megatron_set),
        ),
        Target(
            "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
            "6821e1e397253d43",
            silence_warning,
        ),
    ),
    reproduces=reproduces,
)
