"""A data loader draws a seed from the generator that, without a GPU, dropout draws from too."""

from collections.abc import Callable
from functools import wraps

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
    """True where starting a loader without a generator moves the global one."""
    before = torch.default_generator.get_state()
    iter(torch.utils.data.DataLoader([0]))
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
