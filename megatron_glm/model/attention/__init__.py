"""Attention over packed samples with a bidirectional context: one interface, one file a backend."""

from megatron_glm.model.attention.backends import BACKENDS

__all__ = ["BACKENDS"]
