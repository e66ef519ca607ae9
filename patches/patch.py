"""What a patch is: a fault of another package, where it sits, and what stands in for it."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet

SOURCE_DIGITS = 16
# Packages whose kernels Megatron takes where it can import them.
FUSED_KERNELS = ("transformer_engine", "apex")


class PatchDriftError(RuntimeError):
    """The code under a patch is not the code that the patch was written against."""


@dataclass(frozen=True)
class Target:
    """One name to be replaced.

    `path` is `module:attribute`, the attribute dotted for a method. `replace` takes the object
    found there and returns the one that takes its place. `source` is the start of the sha256 of
    the object's source, or "compiled" where it has none. `also` names the other places, in the
    same form, where the object is bound once Megatron is imported.
    """

    path: str
    source: str
    replace: Callable[[Any], Any]
    also: tuple[str, ...] = ()

    def current(self) -> Any:
        """The object bound at `path`; imports the module."""
        return resolve(self.path)

    def current_source(self) -> str:
        """What `source` would be for the code now found at `path`, wrappers taken off."""
        try:
            text = inspect.getsource(inspect.unwrap(unbound(self.current())))
        except (TypeError, OSError):
            return "compiled"
        return hashlib.sha256(text.encode()).hexdigest()[:SOURCE_DIGITS]

    def install(self) -> None:
        """Replace the object everywhere it is bound."""
        original = self.current()
        replacement = self.replace(original)
        for path in (self.path, *self.also):
            assign(path, replacement)


@dataclass(frozen=True)
class Patch:
    """One upstream fault and its cure.

    `versions` maps a distribution to the versions that the patch knows, as in a requirement.
    `when` names the machines that need it, a key of `CONDITIONS`. `reproduces` is true while the
    fault is there; it must run in a process in which the patch was not applied.
    """

    reason: str
    upstream: str
    versions: dict[str, str]
    when: str
    targets: tuple[Target, ...]
    reproduces: Callable[[], bool]

    def needed(self) -> bool:
        """Whether this machine is one of those that `when` names."""
        return CONDITIONS[self.when]()

    def check_versions(self, name: str) -> None:
        """Raise PatchDriftError where an installed version is none that the patch knows."""
        for distribution, known in self.versions.items():
            installed = metadata.version(distribution)
            if not SpecifierSet(known).contains(installed, prereleases=True):
                raise PatchDriftError(
                    f"patches/{name}.py knows {distribution} {known}, installed is {installed}. "
                    f"Install {distribution}{known}, or see whether {installed} still has the "
                    "fault (python -m patches) and then widen `versions` or delete the file."
                )

    def check_sources(self, name: str) -> None:
        """Raise PatchDriftError where the code under the patch has changed."""
        for target in self.targets:
            try:
                found = target.current_source()
            except (ImportError, AttributeError) as error:
                raise PatchDriftError(
                    f"patches/{name}.py replaces {target.path}, which is gone ({error}). "
                    "See whether upstream has cured the fault; if so, delete the file."
                ) from error
            if found != target.source:
                raise PatchDriftError(
                    f"patches/{name}.py was written against {target.path} with source "
                    f"{target.source}, found {found}. Reinstall the pinned versions "
                    "(constraints.txt), or compare the two sources, mend the patch and record "
                    "the new hash."
                )
            for path in target.also:
                if resolve(path) is not target.current():
                    raise PatchDriftError(
                        f"patches/{name}.py expects {path} to be {target.path}; it is "
                        f"{resolve(path)!r}. Mend `also` of that target."
                    )


def no_gpu() -> bool:
    """Whether torch sees no CUDA device."""
    return not torch.cuda.is_available()


def idle_kernels() -> bool:
    """Whether there are kernels for GPUs, hidden or not, and torch sees none."""
    return no_gpu() and any(
        name in sys.modules or importlib.util.find_spec(name) for name in FUSED_KERNELS
    )


def no_fused_adam() -> bool:
    """Whether Megatron will fall back on torch's AdamW.

    Raises RuntimeError where Transformer Engine is installed but cannot be imported: Megatron
    would end with a bare AssertionError.
    """
    try:
        return no_gpu() or not (
            has_module("transformer_engine.pytorch.optimizers") or has_module("apex.optimizers")
        )
    except Exception as error:
        raise RuntimeError(
            f"Transformer Engine or Apex is installed but its import fails: {error!r}. Install it "
            "whole (for Transformer Engine also transformer-engine-torch, of the same version; "
            "where a cuBLAS symbol is undefined, a newer nvidia-cublas) or uninstall it: Megatron "
            "works without."
        ) from error


def has_module(name: str) -> bool:
    """Whether the module can be imported; any error but its absence is passed on."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


CONDITIONS: dict[str, Callable[[], bool]] = {
    "always": lambda: True,
    "GPU": lambda: not no_gpu(),
    "no GPU": no_gpu,
    "no GPU, but Transformer Engine or Apex": idle_kernels,
    "no Transformer Engine or Apex": no_fused_adam,
}


def constant(value: Any) -> Callable[[Any], Any]:
    """A replacement that does not depend on what it replaces."""
    return lambda _: value


def resolve(path: str) -> Any:
    """The object at `module:attribute`, a method as it stands in its class."""
    holder, name = _holder(path)
    return (
        inspect.getattr_static(holder, name) if inspect.isclass(holder) else getattr(holder, name)
    )


def assign(path: str, value: Any) -> None:
    """Bind `value` at `module:attribute`."""
    holder, name = _holder(path)
    setattr(holder, name, value)


def unbound(value: Any) -> Any:
    """The function inside a class or static method."""
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


def _holder(path: str) -> tuple[Any, str]:
    module, _, attribute = path.partition(":")
    *parents, name = attribute.split(".")
    holder = importlib.import_module(module)
    for parent in parents:
        holder = getattr(holder, parent)
    return holder, name
