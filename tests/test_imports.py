"""Who may know whom: the rules of the architecture, read from the import statements."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "megatron_glm"

# What each part of the library may import from the others, beside itself.
MAY_IMPORT = {
    "flags": ("data", "model", "planning.batch_sizes"),
    "data": (),
    "model": (),
    "training": ("data", "model", "planning"),
    "checkpoint": ("model.config",),
    "inference": ("model", "checkpoint", "data.tokenizer"),
    "planning": ("model.target_rows",),
}
# Files that a reader can follow with numpy or torch alone, and a test can run without ranks.
PURE = (
    "data/blank_infilling.py",
    "data/packing.py",
    "data/span_sampling.py",
    "checkpoint/quantization.py",
    "planning/memory.py",
)
ENTRY_POINTS = (
    *("pretrain_glm.py", "tools/*.py", "benchmarks/*.py", "tests/conftest.py"),
    *("tests/rank_preload.py",),
)
# What has a program find the packages beside it, so that a clone needs no installation of itself,
# and one that is installed elsewhere is not taken instead.
OWN_ROOT = "sys.path.insert(0, str(Path(__file__).resolve().parent.parent))"
# Loads Megatron as it is, to measure it against.
UNPATCHED = ("benchmarks/preprocess.py",)


def python_files(*patterns: str) -> list[Path]:
    """Files of the repository, by pattern."""
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    """Dotted name under which the file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path | None:
    """The file of a module of this repository."""
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def imported(statement: ast.stmt, path: Path) -> set[str]:
    """Modules named by one import statement; for `from a import b` both a and, if one, a.b."""
    if isinstance(statement, ast.Import):
        return {alias.name for alias in statement.names}
    package = name_of(path).split(".")
    base = statement.module or ""
    if statement.level:
        depth = len(package) - statement.level + (path.name == "__init__.py")
        base = ".".join([*package[:depth], *filter(None, [statement.module])])
    members = {f"{base}.{alias.name}" for alias in statement.names}
    return {base} | {member for member in members if file_of(member)}


def imports(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules that a file imports; `at_import_only` leaves out those inside functions."""
    found: set[str] = set()
    pending: list[ast.AST] = [tree(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= imported(node, path)
        elif not (at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))
    return found


@cache
def loads_megatron(module: str) -> bool:
    """Whether importing a module of this repository imports Megatron."""
    return "megatron" in loaded_by(module)


@cache
def loaded_by(module: str) -> frozenset[str]:
    """Top packages and modules of this repository that importing `module` loads."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        current = pending.pop()
        path = file_of(current)
        if path is None:
            seen.add(current.partition(".")[0])
        elif current not in seen:
            seen.add(current)
            pending.extend(imports(path, at_import_only=True))
            pending.extend(parents(current))
    return frozenset(seen)


def parents(module: str) -> list[str]:
    """Packages whose __init__ runs before the module."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts)) if parts[0] == LIBRARY]


def starts_with(module: str, *prefixes: str) -> bool:
    """Whether the module is one of the packages or inside one."""
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def offences(pattern: str, *forbidden: str) -> list[str]:
    """Imports of forbidden packages in the files of a pattern."""
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(pattern)
        for module in sorted(imports(path))
        if starts_with(module, *forbidden)
    ]


def test_the_library_and_the_patches_do_not_know_each_other():
    assert offences(f"{LIBRARY}/**/*.py", "patches") == []
    assert offences("patches/*.py", LIBRARY) == []


def test_nothing_knows_the_programs_and_the_tests():
    outer = ("tools", "examples", "benchmarks", "tests", "pretrain_glm")
    assert offences(f"{LIBRARY}/**/*.py", *outer) == []
    assert offences("patches/*.py", *outer) == []


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_of_the_library_imports_only_what_it_may_know(part):
    allowed = [f"{LIBRARY}.{other}" for other in (part, *MAY_IMPORT[part])]
    strangers = [f"{LIBRARY}.{other}" for other in MAY_IMPORT if other != part]
    assert [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(f"{LIBRARY}/{part}/**/*.py")
        for module in sorted(imports(path))
        if starts_with(module, *strangers) and not starts_with(module, *allowed)
    ] == []


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_loads_no_megatron(name):
    path = ROOT / LIBRARY / name
    assert not loads_megatron(name_of(path))
    assert not any(starts_with(module, "torch.distributed") for module in imports(path))


def test_global_arguments_are_read_in_the_training_program_alone():
    files = python_files(f"{LIBRARY}/**/*.py", "tools/*.py", "benchmarks/*.py")
    assert [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in files
        for node in ast.walk(tree(path))
        if (isinstance(node, ast.Name) and node.id == "get_args")
        or (isinstance(node, ast.Attribute) and node.attr == "get_args")
        or (isinstance(node, ast.alias) and node.name == "get_args")
    ] == []


@pytest.mark.parametrize("path", python_files(*ENTRY_POINTS), ids=name_of)
def test_an_entry_point_applies_the_patches_before_it_loads_megatron(path):
    needs = [module for module in imports(path) if module != "patches" and megatron_behind(module)]
    if not needs:
        return
    if str(path.relative_to(ROOT)) in UNPATCHED:
        pytest.skip("loads Megatron as it is, to measure it against")
    calls = [node for node in ast.walk(tree(path)) if is_apply(node)]
    assert calls, f"loads Megatron through {needs} without patches.apply()"
    first = min(call.lineno for call in calls)
    early = [
        module
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom) and node.lineno < first
        for module in imported(node, path)
        if module != "patches" and megatron_behind(module)
    ]
    assert early == [], f"{early} load Megatron before patches.apply() on line {first}"


@pytest.mark.parametrize("path", python_files("tools/*.py"), ids=name_of)
def test_a_tool_uses_the_packages_beside_it(path):
    own = [
        node.lineno
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and starts_with(min(imported(node, path)), LIBRARY, "patches")
    ]
    set_up = [node.lineno for node in tree(path).body if ast.unparse(node) == OWN_ROOT]
    assert not own or (set_up and set_up[0] < min(own)), f"lacks {OWN_ROOT} before its imports"


def megatron_behind(module: str) -> bool:
    """Whether importing any module loads Megatron."""
    return starts_with(module, "megatron") or (file_of(module) and loads_megatron(module))


def is_apply(node: ast.AST) -> bool:
    """Whether the node is the call `patches.apply()`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "apply"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "patches"
    )


def test_the_checks_see_what_they_look_for():
    assert "megatron" in loaded_by(f"{LIBRARY}.model.glm_model")
    assert imports(ROOT / "tests" / "conftest.py") >= {"os", "pytest", "torch", "patches"}
    assert imports(ROOT / "patches" / "cpu_rng.py") >= {"patches.patch", "torch"}
