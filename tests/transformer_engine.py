"""Transformer Engine in tests: which need it, and how it runs where its kernels cannot."""

from collections.abc import Iterator
from importlib import metadata

import pytest

from tests.ranks import preloading

# On a machine without a GPU it is hidden from imports, so these would not find it.
needs_transformer_engine = pytest.mark.skipif(
    not list(metadata.distributions(name="transformer-engine")),
    reason="Transformer Engine is not installed",
)


@pytest.fixture(scope="module")
def emulated() -> Iterator[None]:
    """Ranks see Transformer Engine with torch in the place of its kernels."""
    with preloading("tests.emulated_transformer_engine"):
        yield
