"""The backends of prefix attention by name, and which of them suits a tensor."""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module

from torch import Tensor

from megatron_glm.errors import GLMError

logger = logging.getLogger(__name__)

Attention = Callable[..., Tensor]
"""What a backend is: attention(query, key, value, samples, *, softmax_scale, dropout=None), with
the shapes of `reference.attention`."""

BACKENDS = ("reference", "sdpa", "chunked", "flex")
"""Names that `--glm-attention-backend` takes besides auto; each is a module beside this one."""


@cache
def load_backend(name: str) -> Attention:
    """The attention function of a backend; imports what it needs on first use.

    Raises:
        GLMError: a name outside BACKENDS.
    """
    if name not in BACKENDS:
        raise GLMError(
            f"--glm-attention-backend {name}: unknown; use auto or one of {', '.join(BACKENDS)}"
        )
    return import_module(f"{__package__}.{name}").attention


def select_backend(name: str, query: Tensor, dropout_probability: float) -> Attention:
    """The backend called `name` or, for auto, the fastest one for this device and dropout."""
    if name == "auto":
        name = _choose(query.device.type, dropout_probability > 0.0)
    return load_backend(name)


@cache
def _choose(device: str, has_dropout: bool) -> str:
    name = "sdpa" if device == "cpu" else "reference"
    logger.info("prefix attention on %s%s: backend %s", device,
                " with dropout" if has_dropout else "", name)
    return name
