"""Recomputing a function that returns a parameter makes that parameter its own ancestor."""

from collections.abc import Callable
from functools import wraps
from typing import Any
from unittest import mock

import torch

from patches.patch import Patch, Target, unbound


def copy_parameters(forward: Any) -> Any:
    """The forward pass of the checkpoint, with a copy of each parameter among its outputs."""
    forward = unbound(forward)

    @wraps(forward)
    def forward_of_copies(ctx: Any, function: Callable, *args: Any) -> Any:
        outputs = forward(ctx, function, *args)
        if isinstance(outputs, tuple):
            return tuple(copied(output) for output in outputs)
        return copied(outputs)

    return staticmethod(forward_of_copies)


def copied(output: Any) -> Any:
    """`output`, or its copy where autograd would take the original for a result."""
    return output.clone() if isinstance(output, torch.nn.Parameter) else output


def reproduces() -> bool:
    """True where a bias that passes through a checkpoint is a leaf no more."""
    from megatron.core.tensor_parallel import random

    bias = torch.nn.Parameter(torch.ones(2))
    # Random states are another matter, and cannot be had without a GPU.
    with mock.patch.object(random, "_get_all_rng_states"):
        random.checkpoint(lambda x: (2 * x, bias), False, torch.ones(2, requires_grad=True))
    return not bias.is_leaf


PATCH = Patch(
    reason="--recompute-modules mlp with a biased MLP returns the bias, which autograd then takes "
    "for an output of the checkpoint: its backward pass calls itself without end",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.tensor_parallel.random:CheckpointFunction.forward",
            "4bcf3f270c667ff1",
            copy_parameters,
        ),
    ),
    reproduces=reproduces,
)
