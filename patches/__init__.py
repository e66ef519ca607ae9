"""Cures for faults of Megatron-Core, one a file; `python -m patches` lists them.

An entry point calls `patches.apply()` before it imports anything of Megatron.
"""

import importlib
import logging
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from patches.patch import Patch, PatchDriftError

__all__ = ["Patch", "PatchDriftError", "apply", "load", "quiet_import"]

_applied: list[str] = []


def load() -> dict[str, Patch]:
    """Every patch by the name of its file, in the order in which they are applied.

    Those of torch and Python come first: they have to stand before Megatron is imported.
    """
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(("cpu_", "fix_"))]
    found = {name: importlib.import_module(f"patches.{name}").PATCH for name in names}
    return dict(sorted(found.items(), key=lambda item: _is_of_megatron(item[1])))


def apply() -> list[str]:
    """Apply the patches that this machine needs and return their names.

    A second call does nothing and returns the same names. Raises PatchDriftError, with nothing
    of Megatron patched, where a version or a source is not the one that a patch knows, and
    RuntimeError where Megatron was imported first.
    """
    if _applied:
        return list(_applied)
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "patches.apply() came after an import of Megatron, which has bound the faulty "
            "functions by now: call it before the first megatron import of the program."
        )
    needed = {name: patch for name, patch in load().items() if patch.needed()}
    for name, patch in needed.items():
        patch.check_versions(name)
    with quiet_import():
        for of_megatron in (False, True):
            _install({n: p for n, p in needed.items() if _is_of_megatron(p) is of_megatron})
    return list(_applied)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Keeps to itself what the first import of Megatron says: ten times that it goes without
    Transformer Engine and Apex, and that there is a compiler for CUDA but no GPU."""
    about_compiler = logging.getLogger("torch.utils.cpp_extension")
    level = about_compiler.level
    about_compiler.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        about_compiler.setLevel(level)


def _install(stage: dict[str, Patch]) -> None:
    for name, patch in stage.items():
        patch.check_sources(name)
    for name, patch in stage.items():
        for target in patch.targets:
            target.install()
        _applied.append(name)


def _is_of_megatron(patch: Patch) -> bool:
    return any(target.path.startswith("megatron") for target in patch.targets)
