"""List the patches: name, targets, state on this machine and the reason.

`python -m patches --readme` prints patches/README.md instead.
"""

import argparse
import textwrap

from patches import Patch, PatchDriftError, load, quiet_import

README = """\
# Faults of Megatron-Core, and their cures

One fault a file. `patches.apply()` applies what the machine needs, before Megatron is imported;
it refuses code that is not the code a patch was written against. A training log names what was
applied, and `python -m patches` shows the state of each here. A test runs each fault without its
patch: when upstream has cured one, that test says to delete the file. This page is made by
`python -m patches --readme`.

| patch | needed | what goes wrong without it | upstream |
|---|---|---|---|
"""


def state(name: str, patch: Patch) -> str:
    """One line on whether the patch would be applied here."""
    try:
        patch.check_versions(name)
        patch.check_sources(name)
    except PatchDriftError as drift:
        return f"DRIFTED: {drift}"
    return "applies here" if patch.needed() else f"not needed here (only: {patch.when})"


def describe(name: str, patch: Patch) -> str:
    """A patch with its targets and its state."""
    reason = textwrap.fill(patch.reason, 96, initial_indent="  ", subsequent_indent="  ")
    targets = "\n".join(f"  {target.path} [{target.source}]" for target in patch.targets)
    return f"{name}: {state(name, patch)}\n{reason}\n  upstream: {patch.upstream}\n{targets}"


def readme() -> str:
    """The page about all patches."""
    rows = (
        f"| `{name}` | {patch.when} | {patch.reason} | {patch.upstream} |\n"
        for name, patch in load().items()
    )
    return README + "".join(rows)


def main() -> None:
    """Print the list or the page."""
    parser = argparse.ArgumentParser(prog="python -m patches", description=__doc__)
    parser.add_argument("--readme", action="store_true", help="print patches/README.md")
    if parser.parse_args().readme:
        print(readme(), end="")
    else:
        with quiet_import():
            found = [describe(name, patch) for name, patch in load().items()]
        print("\n".join(found))


if __name__ == "__main__":
    main()
