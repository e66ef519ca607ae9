"""The distributed optimizer restores the step count, then copies an older one over it."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from patches.patch import Patch, Target


def keep_step(set_states: Callable) -> Callable:
    """_set_main_param_and_optimizer_states that leaves the step count alone."""

    @wraps(set_states)
    def set_all_but_step(self: Any, model_param: torch.Tensor, tensors: dict) -> None:
        # What is no tensor is passed over; the key itself must be there.
        set_states(self, model_param, {**tensors, "step": None})

    return set_all_but_step


def reproduces() -> bool:
    """True where the step count among the loaded tensors replaces the restored one."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameter = torch.nn.Parameter(torch.ones(2))
    inner = torch.optim.AdamW([parameter])
    inner.state[parameter] = {"step": torch.tensor(5.0)}
    optimizer = SimpleNamespace(
        optimizer=inner,
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={parameter: (0, 0)},
    )
    loaded = {"param": torch.zeros(2), "step": torch.tensor(0.0)}
    with torch.no_grad():
        DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, parameter, loaded)
    return inner.state[parameter]["step"].item() == 0


PATCH = Patch(
    reason="the step count is stored with the parameter groups and restored from there; what the "
    "parameter state holds under the same name was never loaded, and replaces it in silence "
    "(loss off by 0.07)",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="no Transformer Engine or Apex",
    targets=(
        Target(
            "megatron.core.optimizer.distrib_optimizer:"
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            "40cab784659711a8",
            keep_step,
        ),
    ),
    reproduces=reproduces,
)
