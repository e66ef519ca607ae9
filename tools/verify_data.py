"""Compare datasets with their checksums, to the last byte: after a copy, before a long run.

    python tools/verify_data.py corpus_text_document ...

Takes prefixes, or their .bin files. Training itself compares the index and both ends of the .bin,
which takes no time; this reads the files whole. The exit status is 1 where one is damaged, or has
no PREFIX.checksums.json to be compared with.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_glm.data.indexed import IndexedDatasetError, check_indexed_dataset, checksums_path
from megatron_glm.errors import exit_with_one_line


def verdict(prefix: str) -> str:
    """What is wrong with a dataset, "" where it is whole."""
    try:
        check_indexed_dataset(prefix, contents=True)
    except IndexedDatasetError as error:
        return str(error)
    if not checksums_path(prefix).exists():
        return f"{checksums_path(prefix)}: no such file; only the sizes could be compared"
    return ""


def verify(prefixes: Iterable[str]) -> bool:
    """Prints a line a dataset; True where all are whole."""
    good = True
    for prefix in prefixes:
        fault = verdict(prefix)
        good &= not fault
        print(f"NOT whole: {fault}" if fault else f"whole: {prefix}", flush=True)
    return good


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="path without suffix")
    args = parser.parse_args(arguments)
    with exit_with_one_line():
        good = verify(prefix.removesuffix(".bin") for prefix in args.prefixes)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
