"""Megatron builds a C++ helper which its wheel already brings, from a Makefile left out of it."""

from pathlib import Path

from patches.patch import Patch, Target, constant


def compile_helpers() -> None:
    """Nothing to build: `helpers_cpp` is part of the wheel."""


def reproduces() -> bool:
    """True where the wheel has the built helper, and the attempt to build it ends the program."""
    from megatron.core.datasets import helpers_cpp, utils

    if Path(helpers_cpp.__file__).with_name("Makefile").exists():
        return False
    try:
        utils.compile_helpers()
    except (SystemExit, FileNotFoundError):
        return True
    return False


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
