"""Megatron builds a C++ helper which its wheel already brings, from a Makefile left out of it."""

from pathlib import Path

from patches.patch import Patch, Target, constant


def compile_helpers() -> None:
    """Nothing to build: `helpers_cpp` is part of the wheel."""


def reproduces() -> bool:
    """True where the wheel has the built helper and no Makefile."""
    from megatron.core import datasets

    folder = Path(datasets.__file__).parent
    return any(folder.glob("helpers_cpp*.so")) and not (folder / "Makefile").exists()


PATCH = Patch(
    reason="compile_helpers() runs make where the wheel has no Makefile, and exits",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.datasets.utils:compile_helpers",
            "84029a50ae8cfac1",
            constant(compile_helpers),
        ),
    ),
    reproduces=reproduces,
)
