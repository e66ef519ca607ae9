"""Megatron's optimizers sort parameters by the names of CUDA tensor types."""

from typing import Any

import torch

from patches.patch import Patch, Target, unbound


def without_cuda(original: Any) -> Any:
    """The function itself, its constants 'torch.cuda.XTensor' turned into 'torch.XTensor'.

    In place, so that every module that has imported it sees the change.
    """
    function = unbound(original)
    code = function.__code__
    function.__code__ = code.replace(co_consts=tuple(renamed(c) for c in code.co_consts))
    return original


def renamed(constant: Any) -> Any:
    """`constant` with the CUDA tensor types in it renamed."""
    if isinstance(constant, str):
        return constant.replace("torch.cuda.", "torch.")
    if isinstance(constant, tuple):
        return tuple(renamed(part) for part in constant)
    return constant


def reproduces() -> bool:
    """True where clipping refuses a gradient in fp32 because it lies in the CPU's memory."""
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    try:
        clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=1.0)
    except AssertionError:
        return True
    except RuntimeError:
        return False
    return False


PATCH = Patch(
    reason="gradient clipping and the mixed-precision optimizers know 'torch.cuda.FloatTensor' "
    "and its 16-bit kin only, and refuse the same types of the CPU",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="no GPU",
    targets=(
        Target(
            "megatron.core.optimizer.clip_grads:clip_grad_by_total_norm_fp32",
            "cf07b488fb76a8ae",
            without_cuda,
        ),
        Target(
            "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
            "de5b682409221027",
            without_cuda,
        ),
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
            "3fce9be2b6d1d143",
            without_cuda,
        ),
        Target(
            "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.__init__",
            "27507ad691f25754",
            without_cuda,
        ),
    ),
    reproduces=reproduces,
)
