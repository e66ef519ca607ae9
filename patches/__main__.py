"""List the patches: name, targets, state on this machine and the reason."""

import argparse
import textwrap

from patches import Patch, PatchDriftError, load, quiet_import


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


def main() -> None:
    """Print the list."""
    argparse.ArgumentParser(prog="python -m patches", description=__doc__).parse_args()
    with quiet_import():
        found = [describe(name, patch) for name, patch in load().items()]
    print("\n".join(found))


if __name__ == "__main__":
    main()
