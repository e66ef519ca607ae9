"""A data loader draws a seed from the generator that, without a GPU, dropout draws from too."""

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from unittest import mock

import torch

from patches.patch import Patch, Target


def own_generator(build_pretraining_data_loader: Callable) -> Callable:
    """The same loader, with a generator to itself."""

    @wraps(build_pretraining_data_loader)
    def build(*args: object, **kwargs: object) -> object:
        loader = build_pretraining_data_loader(*args, **kwargs)
        if isinstance(loader, torch.utils.data.DataLoader) and loader.generator is None:
            loader.generator = torch.Generator()
        return loader

    return build


def reproduces() -> bool:
    """True where starting Megatron's loader moves the global generator."""
    from megatron.training.datasets import data_samplers

    args = SimpleNamespace(
        dataloader_type="single",
        micro_batch_size=1,
        global_batch_size=1,
        hybrid_context_parallel=False,
        num_workers=0,
    )
    one_rank = SimpleNamespace(
        get_data_parallel_rank=lambda: 0, get_data_parallel_world_size=lambda: 1
    )
    with (
        mock.patch.object(data_samplers, "get_args", lambda: args),
        mock.patch.object(data_samplers, "mpu", one_rank),
    ):
        loader = data_samplers.build_pretraining_data_loader([0], consumed_samples=0)
    before = torch.default_generator.get_state()
    iter(loader)
    return not torch.equal(before, torch.default_generator.get_state())


PATCH = Patch(
    reason="a resumed run starts its data loaders after it has restored the random states; the "
    "seed that a loader draws then shifts every later dropout mask",
    upstream="not reported",
    versions={"torch": "==2.11.*", "megatron-core": "==0.19.*"},
    when="no GPU",
    targets=(
        Target(
            "megatron.training.datasets.data_samplers:build_pretraining_data_loader",
            "1f53bc68dccca32d",
            own_generator,
            also=("megatron.training.training:build_pretraining_data_loader",),
        ),
    ),
    reproduces=reproduces,
)
