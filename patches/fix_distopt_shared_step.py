"""The distributed optimizer gives all parameters one step counter, and AdamW counts in place."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from patches.patch import Patch, Target


def unshare_step(load_state_dict: Callable) -> Callable:
    """load_state_dict that leaves each parameter a counter of its own."""

    @wraps(load_state_dict)
    def load(self: Any, state_dict: dict) -> None:
        load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load


def reproduces() -> bool:
    """True where two parameters have the same counter after a load."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    inner = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    inner.step()
    optimizer = SimpleNamespace(
        optimizer=inner,
        grad_scaler=None,
        config=SimpleNamespace(fp16=False),
        ddp_config=SimpleNamespace(use_megatron_fsdp=False),
    )
    DistributedOptimizer.load_state_dict(optimizer, DistributedOptimizer.state_dict(optimizer))
    first, second = (inner.state[parameter]["step"] for parameter in parameters)
    return first is second


PATCH = Patch(
    reason="after a load all parameters share one step counter, so that it grows by their number "
    "each step and the bias correction of AdamW is lost in silence (loss off by 0.01)",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="no Transformer Engine or Apex",
    targets=(
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            "7e5f988b86b48501",
            unshare_step,
        ),
    ),
    reproduces=reproduces,
)
