"""The documents of a block, or why one is left out."""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

from megatron_glm.data.preprocessing.blocks import BLANK_LINES, Block, Reject

LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)*")


class Document(NamedTuple):
    """The text of each key, and where the document starts in its file (line from 1)."""

    file: str
    line: int
    texts: tuple[str, ...]


class BadDocumentError(ValueError):
    """Why a document cannot be used."""


def read_documents(block: Block, keys: Sequence[str]) -> Iterator[Document | Reject]:
    """All documents of a block in their order."""
    yield from block.rejects
    for path, lines_before, data in block.parts:
        for line, raw in _SPLITTERS[block.kind](data, lines_before):
            try:
                yield Document(path, line, _PARSERS[block.kind](raw, keys))
            except BadDocumentError as error:
                yield Reject(path, line, str(error), _show(raw))


def _show(raw: object) -> str:
    return raw[:200].decode(errors="replace") if isinstance(raw, bytes) else str(raw)[:200]


def _split_lines(data: bytes, lines_before: int) -> Iterator[tuple[int, bytes]]:
    if not lines_before:
        data = data.removeprefix(codecs.BOM_UTF8)
    for i, line in enumerate(data.split(b"\n")):
        if line and not line.isspace():
            yield lines_before + i + 1, line


def _split_paragraphs(data: bytes, lines_before: int) -> Iterator[tuple[int, bytes]]:
    start = 0
    ends = [match.end() for match in BLANK_LINES.finditer(data)] + [len(data)]
    line = lines_before
    for end in ends:
        blank = LEADING_BLANK_LINES.match(data, start, end).end()
        text = data[blank:end].rstrip()
        if text:
            yield line + data.count(b"\n", start, blank) + 1, text
        line += data.count(b"\n", start, end)
        start = end


def _split_rows(rows: list, lines_before: int) -> Iterator[tuple[int, tuple]]:
    return enumerate(rows, lines_before + 1)


def _whole_file(data: bytes, lines_before: int) -> Iterator[tuple[int, bytes]]:
    yield 1, data


def _parse_json(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadDocumentError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadDocumentError(f"a JSON {type(record).__name__}, not an object")
    for key in keys:
        if key not in record:
            raise BadDocumentError(f"no key {key!r}")
    return tuple(_check_text(record[key], key) for key in keys)


def _parse_row(row: tuple, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        _check_text(_decode(value) if isinstance(value, bytes) else value, key)
        for value, key in zip(row, keys, strict=True)
    )


def _parse_text(data: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    return (_check_text(_decode(data.removeprefix(codecs.BOM_UTF8)), "text"),)


def _decode(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadDocumentError(f"not UTF-8: {error.reason} at byte {error.start}") from None


def _check_text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadDocumentError(f"key {key!r} holds a {type(value).__name__}, not text")
    if not value:
        raise BadDocumentError(f"key {key!r} is empty")
    return value


_SPLITTERS = {
    "jsonl": _split_lines,
    "rows": _split_rows,
    "paragraphs": _split_paragraphs,
    "files": _whole_file,
}
_PARSERS = {
    "jsonl": _parse_json,
    "rows": _parse_row,
    "paragraphs": _parse_text,
    "files": _parse_text,
}
