"""Whether the flags name the text of each split, and in which shares."""

import json
from argparse import Namespace
from math import inf
from pathlib import Path

from megatron_glm.errors import FlagError, flag_of

PARTS = ("train", "valid", "test")


def check_data_paths(args: Namespace) -> None:
    """Raises FlagError where the flags do not say in one way which text is read in which shares."""
    parts = [f"--{part}-data-path" for part in PARTS if getattr(args, f"{part}_data_path")]
    ways = [
        flags for flags in (
            ["--data-path"] * bool(args.data_path),
            ["--data-args-path"] * bool(args.data_args_path),
            parts,
            ["--per-split-data-args-path"] * bool(args.per_split_data_args_path),
        ) if flags
    ]  # fmt: skip
    if len(ways) > 1:
        raise FlagError(
            f"{' '.join(ways[0])} with {' '.join(ways[1])}: give one of both, what --split divides "
            "or a path for each split"
        )
    if parts and not args.train_data_path and not args.skip_train:
        raise FlagError(
            f"{' '.join(parts)} without --train-data-path: the run would train on nothing; give "
            "it, or --skip-train"
        )
    for part in ("data", *(f"{part}_data" for part in PARTS), "multitask_data"):
        items = getattr(args, f"{part}_path") or []
        _check_weights(f"{flag_of(part)}-path {' '.join(items)}", items)
    shares = [_number(share) for share in (args.split or "1").split(",")]
    if (
        len(shares) > 3
        or not all(share is not None and 0 <= share < inf for share in shares)
        or not (shares[0] or args.skip_train)
    ):
        raise FlagError(
            f"--split {args.split}: must be the shares of training, validation and test data, like "
            "949,50,1, the first above 0"
        )


def check_data_files(args: Namespace) -> None:
    """Raises FlagError where the files that stand for such flags cannot be read as such."""
    if args.data_args_path:
        shown = f"--data-args-path {args.data_args_path}"
        _check_weights(shown, _read(shown, args.data_args_path).split())
    if not args.per_split_data_args_path:
        return
    shown = f"--per-split-data-args-path {args.per_split_data_args_path}"
    text = _read(shown, args.per_split_data_args_path)
    try:
        paths = [json.loads(text)[part] for part in PARTS]
    except (ValueError, KeyError, TypeError) as error:
        raise FlagError(f"{shown}: must be a JSON object of {', '.join(PARTS)}") from error
    for items in paths:
        _check_weights(shown, items.split() if isinstance(items, str) else items or [])
    if not paths[0] and not args.skip_train:
        raise FlagError(f"{shown}: has nothing to train on; fill in train, or give --skip-train")


def _read(shown: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise FlagError(f"{shown}: cannot be read ({error.strerror})") from error


def _check_weights(shown: str, items: list[str]) -> None:
    numbers = [_number(item) for item in items]
    weights, prefixes = numbers[::2], numbers[1::2]
    if any(number is not None for number in numbers) and not (
        len(weights) == len(prefixes)
        and all(weight is not None and 0 < weight < inf for weight in weights)
        and not any(number is not None for number in prefixes)
    ):
        raise FlagError(f"{shown}: must be prefixes alone, or each behind its weight, above 0")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
