"""The optimizer's step in few kernels, where Megatron has neither Transformer Engine nor Apex.

Megatron takes its Adam and its operations on lists of tensors from one of the two. Without them it
falls back on torch's AdamW in a form of eight passes over the weights, 80 bytes a weight instead of
28, and on loops over the parameters: that for the gradient's norm waits for the device each time.
"""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as mixed_precision
from torch import Tensor

from megatron_glm.training.optimizer_state import with_steps_by_group, with_steps_by_weight
from megatron_glm.training.split_adam import SplitAdam


def provide_fused_optimizer() -> None:
    """Fills the places that Megatron has for Apex; where a fused Adam is installed, only has it
    load the state of any other."""
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        megatron_optimizer.Adam = loading_any_state(megatron_optimizer.Adam)
        return
    megatron_optimizer.Adam = adam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    clip_grads.l2_norm_impl = l2_norm
    clip_grads.multi_tensor_scale_impl = scale
    mixed_precision.multi_tensor_scale_impl = scale
    mixed_precision._multi_tensor_copy_this_to_that = copy


def adam(
    params: Iterable, *, use_decoupled_grad: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """The Adam of a run: use_decoupled_grad is how Megatron asks by --use-precision-aware-optimizer
    for one that holds the main weights itself."""
    return (SplitAdam if use_decoupled_grad else FusedAdam)(params, **options)


def uses_split_adam(args: Namespace) -> bool:
    """Whether it will be SplitAdam: asked for, and not Transformer Engine's."""
    return args.use_precision_aware_optimizer and megatron_optimizer.Adam is adam


class FusedAdam(torch.optim.Adam):
    """torch's Adam in one kernel, which reads and writes every tensor once; made as Apex's is.

    adam_w_mode: decoupled weight decay, as in AdamW. The rest is torch.optim.Adam's.
    """

    def __init__(self, params: Iterable, *, adam_w_mode: bool = True, **options: Any):
        super().__init__(params, decoupled_weight_decay=adam_w_mode, fused=True, **options)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(with_steps_by_weight(state_dict, self.defaults))


def loading_any_state(adam: type) -> type:
    """The Adam of Transformer Engine or Apex that also loads what torch's has saved."""

    class LoadingAdam(adam):
        def load_state_dict(self, state_dict: dict) -> None:
            super().load_state_dict(with_steps_by_group(state_dict, self.defaults))

    return LoadingAdam


def l2_norm(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """Euclidean norm, fp32 [1], of all tensors of lists[0] together; without a sync.

    Arguments are those of amp_C.multi_tensor_l2norm; chunk_size, overflow and per_tensor mean
    nothing here.
    """
    norms = torch._foreach_norm(lists[0], 2, torch.float32)
    return torch.stack(norms).norm().view(1), None


def scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """lists[1] = lists[0] * factor, tensor by tensor; arguments as amp_C.multi_tensor_scale's."""
    sources, targets = lists
    if sources is targets:
        torch._foreach_mul_(targets, factor)
    else:
        scaled = sources if factor == 1 else torch._foreach_mul(sources, factor)
        torch._foreach_copy_(targets, scaled)


def copy(this: list[Tensor], that: list[Tensor], overflow_buf: Tensor | None = None) -> None:
    """that = this, tensor by tensor, between any two dtypes."""
    if this:
        torch._foreach_copy_(that, this)
