"""pretrain() insists on CUDA, although initialize_megatron() can do without."""

from collections.abc import Callable
from functools import partial, update_wrapper

from patches.patch import Patch, Target


def without_cuda(initialize_megatron: Callable) -> Callable:
    """initialize_megatron with its own `allow_no_cuda` switched on."""
    return update_wrapper(partial(initialize_megatron, allow_no_cuda=True), initialize_megatron)


def reproduces() -> bool:
    """True where what pretrain calls stops for want of CUDA, rather than of arguments."""
    from megatron.training.training import initialize_megatron

    try:
        initialize_megatron()
    except AssertionError as error:
        return "requires CUDA" in str(error)
    return False


PATCH = Patch(
    reason="pretrain() never passes allow_no_cuda, so that initialize_megatron() stops without a "
    "GPU",
    upstream="https://github.com/NVIDIA-NeMo/Speech/issues/14244 (no CPU path is meant)",
    versions={"megatron-core": "==0.19.*"},
    when="no GPU",
    targets=(
        Target(
            "megatron.training.initialize:initialize_megatron",
            "d9b467adcaed1325",
            without_cuda,
            also=(
                "megatron.training:initialize_megatron",
                "megatron.training.training:initialize_megatron",
            ),
        ),
    ),
    reproduces=reproduces,
)
