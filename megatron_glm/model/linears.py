"""Whose linears a layer is made of: Megatron's own or Transformer Engine's."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_glm.errors import GLMError


class Linears(NamedTuple):
    """The linear whose output features are split over tensor parallel ranks, and the one whose
    input features are; both take Megatron's arguments and return (output, bias or None)."""

    column: Callable
    row: Callable


def select_linears(transformer_impl: str) -> Linears:
    """The linears of `--transformer-impl`; GLMError for one that has none, or that cannot be had
    on this machine."""
    if transformer_impl == "local":
        return Linears(ColumnParallelLinear, RowParallelLinear)
    if transformer_impl == "transformer_engine":
        return _transformer_engine_linears()
    raise GLMError(f"--transformer-impl {transformer_impl}: must be local or transformer_engine")


def _transformer_engine_linears() -> Linears:
    # Megatron catches the same error and puts objects that accept anything in the linears' place.
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        raise GLMError(
            f"--transformer-impl transformer_engine: Transformer Engine cannot be had ({error}); "
            "on a machine with a GPU, pip install --no-build-isolation "
            "'transformer-engine[pytorch]==2.14.1', or leave the flag at local"
        ) from error
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TERowParallelLinear,
    )

    # The plain ones: a norm inside the linear would hide its output, which is the residual.
    return Linears(TEColumnParallelLinear, TERowParallelLinear)
