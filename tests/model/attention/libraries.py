"""What backends of a GPU need beside torch and Triton."""

import pytest

MODULES = {"cudnn": "cudnn", "flash": "flash_attn.cute"}


def skip_without_library(backend: str) -> bool:
    """Skip the test where a backend's library is not installed; whether it has one."""
    if backend in MODULES:
        pytest.importorskip(MODULES[backend])
    return backend in MODULES
