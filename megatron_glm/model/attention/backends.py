"""The backends of prefix attention by name, and which of them suits a device."""

import logging
from functools import cache
from importlib import import_module
from typing import Protocol

from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.model.dropout import Dropout

logger = logging.getLogger(__name__)


class Attention(Protocol):
    """What the function `attention` in the module of each backend is."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        samples: Tensor,
        *,
        softmax_scale: float,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Attention over packed samples, softmax in fp32 or wider.

        Args:
            query, key, value: [s, b, n, d] of one floating dtype; any strides.
            samples: int32 [b, 2, k], see `bounds`.
            softmax_scale: factor on the scores.
            dropout: on the probabilities; None for none.

        Returns:
            [s, b, n * d], dtype of `query`.
        """


BACKENDS = {
    "reference": ("cpu", "cuda"),
    "sdpa": ("cpu",),
    "chunked": ("cpu",),
    "flex": ("cuda",),
    "triton": ("cuda",),
    "cudnn": ("cuda",),
    "flash": ("cuda",),
}
"""Names that `--glm-attention-backend` takes besides auto, each a module beside this one, and the
devices on which it can train."""

OWN_DROPOUT = ("cudnn",)
"""Backends that drop other probabilities than `reference.attention` by the same seed."""

NO_DROPOUT = ("flash",)
"""Backends that refuse dropout."""

DEFAULTS = {"cpu": "sdpa", "cuda": "triton"}
"""What auto means on a device where `trial` has not timed the others; FlexAttention would compile
for every shape."""


def backends_of(device: str) -> list[str]:
    """Names of the backends that can train on a type of device."""
    return [name for name, devices in BACKENDS.items() if device in devices]


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


@cache
def select_backend(name: str, device: str) -> Attention:
    """The backend called `name` or, for auto, the default of a type of device.

    Raises:
        GLMError: a name outside BACKENDS, or one that cannot train on the device.
    """
    chosen = DEFAULTS.get(device, "reference") if name == "auto" else name
    attention = load_backend(chosen)
    if device not in BACKENDS[chosen]:
        raise GLMError(
            f"--glm-attention-backend {name}: runs on {' and '.join(BACKENDS[chosen])} and the "
            f"model is on {device}; use auto or one of {', '.join(backends_of(device))}"
        )
    logger.info("prefix attention on %s: backend %s", device, chosen)
    return attention
