"""Megatron makes help texts of docstrings without escaping %, which argparse then interprets."""

import functools
import re
from collections.abc import Callable
from typing import Any

from patches.patch import Patch, Target

BARE_PERCENT = re.compile(r"%(?![%(])")


def escaping(build_kwargs: Callable) -> Callable:
    """The same arguments for argparse, with the bare % signs of the help text doubled."""

    @functools.wraps(build_kwargs)
    def build(factory: Any, attribute: Any) -> dict[str, Any]:
        kwargs = build_kwargs(factory, attribute)
        return kwargs | {"help": BARE_PERCENT.sub("%%", kwargs["help"])}

    return build


def reproduces() -> bool:
    """True where printing the help of Megatron's flags ends in a formatting error."""
    from argparse import ArgumentParser

    from megatron.training.arguments import add_megatron_arguments

    try:
        add_megatron_arguments(ArgumentParser(allow_abbrev=False)).format_help()
    except ValueError as error:
        return "format character" in str(error)
    return False


PATCH = Patch(
    reason="--help ends in a ValueError: a docstring with a bare % became a help text",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.training.argument_utils:"
            "ArgumentGroupFactory._build_argparse_kwargs_from_field",
            "e725a6216d4aceeb",
            escaping,
        ),
    ),
    reproduces=reproduces,
)
