"""The state of one Adam, as another loads it.

torch counts steps with every weight, Transformer Engine and Apex in every group of weights, and
each stores in the groups how it takes a step, which is no property of a checkpoint.
"""

from typing import Any

import torch

# What a checkpoint decides of Adam; whatever else is among an optimizer's defaults is its own.
HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


def with_steps_by_group(state_dict: dict, defaults: dict[str, Any]) -> dict:
    """A state_dict of any Adam for one that counts in its groups; `defaults` are that one's."""
    states = state_dict["state"]
    groups = []
    for group in state_dict["param_groups"]:
        counts = [states[i]["step"] for i in group["params"] if "step" in states.get(i, ())]
        step = group.get("step", counts[0] if counts else None)
        groups.append(_adopted(group, defaults) | ({} if step is None else {"step": int(step)}))
    without = {i: {k: v for k, v in state.items() if k != "step"} for i, state in states.items()}
    return state_dict | {"state": without, "param_groups": groups}


def with_steps_by_weight(state_dict: dict, defaults: dict[str, Any]) -> dict:
    """A state_dict of any Adam for one that counts with its weights; `defaults` are that one's."""
    states, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        group = _adopted(group, defaults)
        step = group.pop("step", None)
        groups.append(group)
        for i in group["params"]:
            if states.get(i) and step is not None:
                states[i] = {"step": torch.tensor(float(step))} | states[i]
    return state_dict | {"state": states, "param_groups": groups}


def _adopted(group: dict, defaults: dict[str, Any]) -> dict:
    own = {key: value for key, value in defaults.items() if key not in HYPERPARAMETERS}
    return group | own
