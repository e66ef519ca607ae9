"""Gather English text that is already on any machine with Python: documentation.

    python tools/gather_text.py --output-dir DIR

Takes the documentation strings of every module, the README in each package's metadata, and the
.rst, .md and .txt files of the standard library and the installed packages. Leaves out licences,
tables and what is not prose, and every paragraph that was seen before: packages copy each other's
documentation. Writes DIR/train.jsonl and DIR/valid.jsonl, one {"text", "source"} object a line; a
document is held out by the hash of its name, so the split does not depend on what else is there.
"""

import argparse
import ast
import email
import hashlib
import inspect
import json
import os
import re
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_glm.errors import GLMError, exit_with_one_line

DOCUMENT_SUFFIXES = {".rst", ".md", ".txt"}
MIN_CHARACTERS = 200
# Shorter paragraphs ("Returns:", a heading) are always kept: without them text loses its form.
MIN_PARAGRAPH_CHARACTERS = 60
MIN_LETTER_RATIO = 0.75
MAX_FILE_BYTES = 2 << 20


def find_files(roots: Iterable[Path]) -> list[tuple[str, Path]]:
    """The files worth reading below `roots`, each with its name relative to its root, sorted by
    name. Test suites and licence folders are left out: little of them is prose."""
    files = {}
    for root in roots:
        for folder, folders, names in os.walk(root):
            skip = {"tests", "test", "licenses", "__pycache__"}
            if Path(folder) == Path(root):
                # A standard library folder often holds site-packages, which is a root of its own.
                skip |= {"site-packages", "dist-packages"}
            folders[:] = sorted(set(folders) - skip)
            for name in names:
                path = Path(folder, name)
                if is_wanted(path):
                    files.setdefault(path.relative_to(root).as_posix(), path)
    return sorted(files.items())


def is_wanted(path: Path) -> bool:
    """Whether a file of this name holds documentation."""
    if re.match(r"(licen[cs]e|copying|notice|authors|third)", path.name, re.IGNORECASE):
        return False
    in_metadata = path.parent.suffix in {".dist-info", ".egg-info"}
    if in_metadata:
        return path.name in {"METADATA", "PKG-INFO"}
    return path.suffix == ".py" or path.suffix in DOCUMENT_SUFFIXES


def read_document(path: Path) -> str:
    """The prose of one file, "" where there is none or it cannot be read as UTF-8."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return ""
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if path.suffix == ".py":
        return "\n\n".join(documentation_strings(content))
    if path.name in {"METADATA", "PKG-INFO"}:
        return email.message_from_string(content).get_payload().strip()
    return content.strip()


def documentation_strings(source: str) -> Iterator[str]:
    """The documentation strings of a module, its classes and functions, in the file's order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    todo = [tree]
    while todo:
        node = todo.pop()
        text = ast.get_docstring(node, clean=False)
        if text:
            yield inspect.cleandoc(text).strip()
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        todo.extend(reversed([child for child in node.body if isinstance(child, kinds)]))


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is mostly letters and spaces, rather than a table, a number list or
    line art."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    return letters >= MIN_LETTER_RATIO * len(paragraph)


def drop_repeated(text: str, seen: set[bytes]) -> str:
    """`text` without long paragraphs that are no prose or are in `seen`, which gains the rest."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n").rstrip()
        if not paragraph:
            continue
        if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS:
            if not is_prose(paragraph):
                continue
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def is_held_out(name: str, valid_ratio: float) -> bool:
    """Whether the document of this name belongs to the held-out part."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < valid_ratio * 2**64


def gather(roots: Iterable[Path], max_bytes: int) -> Iterator[tuple[str, str, float]]:
    """Documents as (name, text, share of the files read so far), in the order of their names,
    until their texts are `max_bytes` of UTF-8 together."""
    files = find_files(roots)
    seen: set[bytes] = set()
    size = 0
    # Ctrl-C is for this process, which ends the workers.
    pool = ProcessPoolExecutor(
        initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)
    )
    try:
        texts = pool.map(read_document, [path for _, path in files], chunksize=64)
        for index, ((name, _), text) in enumerate(zip(files, texts, strict=True), start=1):
            text = drop_repeated(text, seen)
            if len(text) < MIN_CHARACTERS:
                continue
            size += len(text.encode())
            yield name, text, index / len(files)
            if size >= max_bytes:
                return
    finally:
        pool.shutdown(cancel_futures=True)


def default_roots() -> list[Path]:
    """The standard library and the folders of installed packages of the running Python."""
    paths = sysconfig.get_paths()
    folders = dict.fromkeys(paths[kind] for kind in ("stdlib", "purelib", "platlib"))
    return [Path(folder) for folder in folders]


def write_parts(documents: Iterable[tuple[str, str, float]], output_dir: Path, valid_ratio: float):
    """Write the documents to train.jsonl and valid.jsonl in `output_dir`, which appear when they
    are whole, and report the progress; return {part: (documents, bytes of text)}."""
    parts = ("train", "valid")
    count, size = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    output_dir.mkdir(parents=True, exist_ok=True)
    unfinished = {part: output_dir / f"{part}.jsonl.part" for part in parts}
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(open(path, "w", encoding="utf-8"))
            for part, path in unfinished.items()
        }
        next_report = time.monotonic() + 3
        for name, text, share in documents:
            part = "valid" if is_held_out(name, valid_ratio) else "train"
            record = {"text": text, "source": name}
            files[part].write(json.dumps(record, ensure_ascii=False) + "\n")
            count[part] += 1
            size[part] += len(text.encode())
            if time.monotonic() > next_report:
                megabytes = sum(size.values()) / 1e6
                print(f"  {share:4.0%} of the files, {megabytes:.1f} MB of text", flush=True)
                next_report = time.monotonic() + 5
    if all(count.values()):
        for part in parts:
            unfinished[part].replace(output_dir / f"{part}.jsonl")
    return {part: (count[part], size[part]) for part in parts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--root", type=Path, action="append", dest="roots",
        help="folder to search, may be repeated; default: the running Python's own",
    )
    parser.add_argument(
        "--max-megabytes", type=float, default=64, help="stop at this much text (10^6 bytes)"
    )
    parser.add_argument(
        "--valid-ratio", type=float, default=0.01, help="share of documents that is held out"
    )
    args = parser.parse_args()
    roots = args.roots or default_roots()
    for root in roots:
        if not root.is_dir():
            parser.error(f"--root {root} is not a folder")
    if not 0 < args.valid_ratio < 1:
        parser.error(f"--valid-ratio {args.valid_ratio} must lie between 0 and 1")

    with exit_with_one_line():
        documents = gather(roots, int(args.max_megabytes * 1e6))
        written = write_parts(documents, args.output_dir, args.valid_ratio)
        if not all(count for count, _ in written.values()):
            where = " ".join(map(str, roots))
            raise GLMError(f"--root {where}: too little text below; name more folders")
        for part, (count, size) in written.items():
            path = args.output_dir / f"{part}.jsonl"
            print(f"{path}: {count:,} documents, {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
