"""Megatron compiles its small fusions, which on a CPU takes longer than it saves."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from patches.patch import Patch, Target


def all_but_megatron(compile: Callable) -> Callable:
    """torch.compile that hands Megatron's own functions back as they are."""

    @wraps(compile)
    def compile_unless_megatron(model: Any = None, **options: Any) -> Any:
        if getattr(model, "__module__", "").startswith("megatron."):
            return model
        return compile(model, **options)

    return compile_unless_megatron


def reproduces() -> bool:
    """True where Megatron's fused functions are compiled ones."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu

    return hasattr(bias_gelu, "_torchdynamo_orig_callable")


PATCH = Patch(
    reason="torch.compile of a dozen element-wise functions takes 50 s at the start of every run",
    upstream="not reported",
    versions={"torch": "==2.11.*", "megatron-core": "==0.19.*"},
    when="no GPU",
    targets=(Target("torch:compile", "5c2d76e422d26369", all_but_megatron),),
    reproduces=reproduces,
)
