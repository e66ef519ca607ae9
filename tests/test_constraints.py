"""constraints.txt pins every package that the project brings in."""

import importlib.metadata
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def needed():
    """The installed versions of all that `.[test]` requires, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"], *project["optional-dependencies"]["test"], "setuptools"]
    todo = [Requirement(line) for line in todo]
    versions, seen = {}, set()
    while todo:
        requirement = todo.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        distribution = importlib.metadata.distribution(requirement.name)
        versions[canonicalize_name(requirement.name)] = distribution.version
        for line in distribution.requires or []:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    return versions


def test_every_needed_package_is_pinned_to_the_installed_version():
    pinned = dict(line.split("==") for line in PINS)
    assert {name: pinned.get(name) for name in needed()} == needed()


def test_pins_name_packages_and_versions_only():
    for line in PINS:
        requirement = Requirement(line)
        assert requirement.url is None and str(requirement.specifier).startswith("==")
