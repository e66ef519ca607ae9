"""The distributed optimizer loads fp32 parameters in place while autograd is watching."""

from types import SimpleNamespace

import torch

from patches.patch import Patch, Target


def reproduces() -> bool:
    """True where loading into a parameter that requires a gradient fails."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = SimpleNamespace(
        optimizer=torch.optim.AdamW([parameter]),
        config=SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False),
        model_param_group_index_map={parameter: (0, 0)},
    )
    try:
        DistributedOptimizer._set_main_param_and_optimizer_states(
            optimizer, parameter, {"param": torch.zeros(2)}
        )
    except RuntimeError:
        return True
    return False


PATCH = Patch(
    reason="the default checkpoint format copies into parameters without no_grad: a run in fp32 "
    "with the distributed optimizer cannot resume",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.optimizer.distrib_optimizer:"
            "DistributedOptimizer._set_main_param_and_optimizer_states",
            "40cab784659711a8",
            torch.no_grad(),
        ),
    ),
    reproduces=reproduces,
)
