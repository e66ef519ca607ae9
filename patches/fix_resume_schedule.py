"""Parameter groups are found in a checkpoint by their learning rate, so none can be changed."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from patches.patch import Patch, Target, unbound

# What the scheduler decides of a group; the rest tells groups apart.
SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")


def adopting(filter_and_reorder: Any) -> Any:
    """_filter_and_reorder_param_groups for saved groups of another schedule too."""
    function = unbound(filter_and_reorder)

    @wraps(function)
    def filter_adopted(current_groups: list[dict], state_dict_groups: list[dict]) -> list[dict]:
        return function(current_groups, with_schedule_of(current_groups, state_dict_groups))

    return staticmethod(filter_adopted)


def adopting_distributed(load_state_dict: Callable) -> Callable:
    """load_state_dict of the distributed optimizer for saved groups of another schedule too."""

    @wraps(load_state_dict)
    def load(self: Any, state_dict: dict) -> None:
        saved = state_dict.get("optimizer", {}).get("param_groups")
        if saved:
            groups = with_schedule_of(self.optimizer.param_groups, saved)
            inner = state_dict["optimizer"] | {"param_groups": groups}
            state_dict = state_dict | {"optimizer": inner}
        load_state_dict(self, state_dict)

    return load


def with_schedule_of(current: list[dict], saved: list[dict]) -> list[dict]:
    """The saved groups, each with the schedule of the current one that it is otherwise equal to.

    A group that has no such twin, or several, is left as it is, for Megatron to judge.
    """
    adopted = []
    for group in saved:
        twins = [other for other in current if identity(other) == identity(group)]
        rivals = [other for other in saved if identity(other) == identity(group)]
        if len(twins) == len(rivals) == 1:
            known = [key for key in SCHEDULED if key in twins[0] or key in group]
            group = group | {key: twins[0].get(key) for key in known}
        adopted.append(group)
    return adopted


def identity(group: dict) -> tuple:
    """What Megatron tells groups apart by, but for the schedule."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    keys = [key for key in param_group_identifier_keys if key not in SCHEDULED]
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


def following(load_state_dict: Callable) -> Callable:
    """load_state_dict of the scheduler that takes the groups along which follow it."""

    @wraps(load_state_dict)
    def load(self: Any, state_dict: dict) -> None:
        before = {key: getattr(self, key) for key in SCHEDULED}
        load_state_dict(self, state_dict)
        for group in self.optimizer.param_groups:
            for key, value in before.items():
                if key in group and group[key] == value:
                    group[key] = getattr(self, key)
        # Loading has set the rate of the next step already.
        self.step(increment=0)

    return load


def reproduces() -> bool:
    """True where a group is not found in a checkpoint that was saved at another learning rate."""
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    saved, current = ({"params": [], "wd_mult": 1.0, "max_lr": lr} for lr in (2e-4, 1e-4))
    try:
        MegatronOptimizer._filter_and_reorder_param_groups([current], [saved])
    except ValueError:
        return True
    return False


PATCH = Patch(
    reason="groups of parameters are matched by max_lr and min_lr: a run that resumes with another "
    "--lr stops, --override-opt-param-scheduler or not, although a smaller one is what cures a "
    "loss spike",
    upstream="https://github.com/NVIDIA/Megatron-LM/pull/4705 (brought it in)",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
            "08e55f3aea6499b7",
            adopting,
        ),
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
            "7e5f988b86b48501",
            adopting_distributed,
        ),
        Target(
            "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
            "ac7965bdea40acc7",
            following,
        ),
    ),
    reproduces=reproduces,
)
