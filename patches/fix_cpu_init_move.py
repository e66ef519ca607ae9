"""A model initialised on the CPU stays there when there is a GPU to train it on."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch

from patches.patch import Patch, Target


def move_first(wrap: Callable) -> Callable:
    """The step between initialisation and mixed precision, preceded by the move."""

    @wraps(wrap)
    def move_and_wrap(model_list: list, transformer_config: Any, *args: Any, **kwargs: Any) -> list:
        initialised = not transformer_config.init_model_with_meta_device
        if transformer_config.use_cpu_initialization and initialised:
            for model in model_list:
                model.cuda(torch.cuda.current_device())
        return wrap(model_list, transformer_config, *args, **kwargs)

    return move_and_wrap


class Witness(torch.nn.Module):
    """A model that remembers whether it was asked to move."""

    moved = False

    def cuda(self, device: Any = None) -> "Witness":
        """Note the move."""
        self.moved = True
        return self


def reproduces() -> bool:
    """True where a model initialised on the CPU is made ready without a move."""
    from megatron.training.models import dist_utils

    model = Witness()
    dist_utils.prepare_existing_model_chunks_for_distributed_training(
        [model],
        SimpleNamespace(
            use_cpu_initialization=True, init_model_with_meta_device=False, fp16=False, bf16=False
        ),
        # Only data-parallel rank 0 prints, and asks for the other groups.
        SimpleNamespace(dp=SimpleNamespace(rank=lambda: 1), cp=SimpleNamespace(rank=lambda: 0)),
        wrap_with_ddp=False,
    )
    return not model.moved


PATCH = Patch(
    reason="--use-cpu-initialization skips the move to the GPU along with the initialisation there",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="GPU",
    targets=(
        Target(
            "megatron.training.models.dist_utils:_wrap_with_mp_wrapper",
            "c265da866dc2fd9b",
            move_first,
        ),
    ),
    reproduces=reproduces,
)
