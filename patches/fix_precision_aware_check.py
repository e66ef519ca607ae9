"""--use-precision-aware-optimizer asks for Transformer Engine's Adam, whichever is to be used."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from patches.patch import Patch, Target


def ask_the_adam_in_use(check: Callable) -> Callable:
    """__post_init__ that asks the Adam which Megatron will make."""

    @wraps(check)
    def __post_init__(self: Any) -> None:
        from megatron.core import optimizer

        store_param_remainders = self.store_param_remainders
        try:
            check(self)
        except RuntimeError:
            # The last thing that it does, and the one thing that it calls a RuntimeError.
            if "use_decoupled_grad" not in inspect.signature(optimizer.Adam).parameters:
                raise
            self.store_param_remainders = store_param_remainders

    return __post_init__


def reproduces() -> bool:
    """True where an Adam that can is refused for not being Transformer Engine's."""
    from megatron.core import optimizer

    own = optimizer.Adam
    optimizer.Adam = lambda params, *, use_decoupled_grad=False, **options: None
    try:
        optimizer.OptimizerConfig(
            use_precision_aware_optimizer=True, use_distributed_optimizer=True
        )
    except RuntimeError:
        return True
    finally:
        optimizer.Adam = own
    return False


PATCH = Patch(
    reason="the flag's check imports the Adam of Transformer Engine and forgets that remainders "
    "were to be stored, though another Adam stands where Megatron takes it from",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="no Transformer Engine or Apex",
    targets=(
        Target(
            "megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
            "8d06c93753e45143",
            ask_the_adam_in_use,
        ),
    ),
    reproduces=reproduces,
)
