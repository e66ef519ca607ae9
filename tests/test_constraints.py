"""constraints.txt pins every package that the project brings in, and all that it imports."""

import ast
import importlib.metadata
import sys
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


# Modules of the extra `attention`, which a GPU alone has use for.
NOT_INSTALLED = {"cutlass", "flash_attn"}


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
    # An extra may be made of others.
    versions.pop("megatron-glm", None)
    return versions


def test_every_needed_package_is_pinned_to_the_installed_version():
    pinned = dict(line.split("==") for line in PINS)
    assert {name: pinned.get(name) for name in needed()} == needed()


def test_pins_name_packages_and_versions_only():
    for line in PINS:
        requirement = Requirement(line)
        assert requirement.url is None and str(requirement.specifier).startswith("==")


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def test_every_import_is_of_a_package_that_the_project_declares():
    folders = ["megatron_glm", "patches", "tools", "benchmarks", "tests"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    imported = {name for path in [*files, *ROOT.glob("*.py")] for name in imported_packages(path)}
    # tools and tests import their neighbours by bare name.
    own = {*folders, *(path.stem for path in files), *(path.stem for path in ROOT.glob("*.py"))}
    declared = set(needed())
    provided = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if {canonicalize_name(distribution) for distribution in distributions} & declared
    }
    assert imported - set(sys.stdlib_module_names) - own - provided - NOT_INSTALLED == set()
