"""The distributed optimizer asks AdamW for a step count before there has been a step."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from patches.patch import Patch, Target


def allocate_first(state_dict: Callable) -> Callable:
    """state_dict that finds a state in the optimizer, at step 0 if need be."""

    @wraps(state_dict)
    def with_state(self: Any) -> dict:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam):
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if not inner.state[parameter]:
                        inner.state[parameter] = at_step_0(parameter, group)
        return state_dict(self)

    return with_state


def at_step_0(parameter: torch.Tensor, group: dict) -> dict[str, torch.Tensor]:
    """What torch's AdamW gives a parameter at its first step."""
    on_device = group.get("fused") or group.get("capturable")
    step = torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else None)
    moments = {key: torch.zeros_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **moments}


def reproduces() -> bool:
    """True where the state of a new optimizer cannot be had."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    try:
        DistributedOptimizer.state_dict(SimpleNamespace(optimizer=inner, grad_scaler=None))
    except AssertionError:
        return True
    return False


PATCH = Patch(
    reason="state_dict() of the distributed optimizer asserts that torch's AdamW has a step count; "
    "a run that resumes asks before the first step and stops",
    upstream="not reported",
    versions={"torch": "==2.11.*", "megatron-core": "==0.19.*"},
    when="no Transformer Engine or Apex",
    targets=(
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.state_dict",
            "fe621ae6a622b587",
            allocate_first,
        ),
    ),
    reproduces=reproduces,
)
