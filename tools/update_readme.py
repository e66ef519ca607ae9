"""Write README.md's generated parts anew: the tree of the sources and the table of patches.

    python tools/update_readme.py

Says nothing of its own: the tree repeats the first line of each file, the table each patch.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from patches import Patch, load

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# What a reader needs to find; folders stand for their files unless these are listed too.
TREE = (
    "pretrain_glm.py", "megatron_glm/", "megatron_glm/*.py", "megatron_glm/*/", "patches/",
    "examples/", "examples/*.sh", "tools/", "tools/*", "benchmarks/", "benchmarks/*.py",
    "benchmarks/*/", "tests/", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run",
)
# Of folders without a Python package in them.
FOLDERS = {
    "examples/": "Whole runs",
    "tools/": "Programs for data, runs and checkpoints",
    "tests/": "Tests, in folders like the sources'",
}


def purpose(path: Path) -> str:
    """What a file or folder is for: the first clause of its documentation, "" if it has none."""
    if path.is_dir():
        return purpose(path / "__init__.py") if (path / "__init__.py").exists() else ""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        comments = [line[2:] for line in text.splitlines() if line.startswith("# ")]
        text = " ".join(comments)
    first = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"\. |\.$|: |; ", first, maxsplit=1)[0]


def source_tree(root: Path = ROOT) -> str:
    """The tree, one file or folder and its purpose a line."""
    found = []
    for pattern in TREE:
        for path in sorted(root.glob(pattern.rstrip("/"))):
            if path.is_dir() == pattern.endswith("/") and not path.name.startswith("__"):
                name = path.relative_to(root).as_posix() + "/" * path.is_dir()
                found.append((name, FOLDERS.get(name) or purpose(path)))
    found = [(name, text) for name, text in found if text]
    rows = []
    for name, text in found:
        # A folder is followed by what is in it.
        folder, _, last = name.rstrip("/").rpartition("/")
        is_inside = f"{folder}/" in dict(found)
        shown = "  " + last + "/" * name.endswith("/") if is_inside else name
        rows.append((shown, text))
    width = max(len(shown) for shown, _ in rows) + 2
    return "```text\n" + "\n".join(f"{shown:{width}}{text}" for shown, text in rows) + "\n```\n"


def patches_table(patches: dict[str, Patch]) -> str:
    """The patches as a Markdown table."""
    rows = ["| patch | needed on | fault | upstream |", "|---|---|---|---|"]
    for name, patch in sorted(patches.items()):
        where = "every machine" if patch.when == "always" else f"machines with {patch.when}"
        rows.append(f"| `{name}` | {where} | {patch.reason} | {patch.upstream} |")
    return "\n".join(rows) + "\n"


def replace_part(readme: str, name: str, content: str) -> str:
    """`readme` with what stands between the two marks of a part replaced."""
    begin, end = f"<!-- {name}: made by tools/update_readme.py -->\n", f"<!-- end of {name} -->\n"
    head, rest = readme.split(begin)
    _, tail = rest.split(end)
    return head + begin + content + end + tail


def updated(readme: str) -> str:
    """`readme` with its generated parts as they should be."""
    readme = replace_part(readme, "tree", source_tree())
    return replace_part(readme, "patches", patches_table(load()))


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    README.write_text(updated(README.read_text()))


if __name__ == "__main__":
    main()
