"""List the patches: name, targets, state on this machine and the reason."""

import textwrap

from patches import PatchDriftError, load


def state(name, patch) -> str:
    """One line on whether the patch would be applied here."""
    try:
        patch.check_versions(name)
        patch.check_sources(name)
    except PatchDriftError as drift:
        return f"DRIFTED: {drift}"
    return "applies here" if patch.needed() else f"not needed here (only: {patch.when})"


def main() -> None:
    """Print every patch."""
    for name, patch in load().items():
        print(f"{name}: {state(name, patch)}")
        print(textwrap.fill(patch.reason, 96, initial_indent="  ", subsequent_indent="  "))
        print(f"  upstream: {patch.upstream}")
        for target in patch.targets:
            print(f"  {target.path} [{target.source}]")


if __name__ == "__main__":
    main()
