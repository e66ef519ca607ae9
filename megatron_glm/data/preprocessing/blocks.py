"""Cutting the inputs into blocks: what a worker encodes at a time, and where a run goes on."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from megatron_glm.data.preprocessing.inputs import InputFile, open_bytes
from megatron_glm.data.preprocessing.parquet import read_row_batches
from megatron_glm.errors import GLMError

BLOCK_BYTES = 1 << 20
# A longer document is rejected: it would otherwise be held in memory whole.
MAX_DOCUMENT_BYTES = 64 << 20
LINE_END = re.compile(rb"\n")
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
# The longest stretch of white space that is still seen as a blank line while skipping.
SKIP_OVERLAP = 4096


class Cursor(NamedTuple):
    """Where the next block starts: file (index into the inputs), offset (bytes before it in the
    decompressed file) and line (lines before it in the file, or rows of parquet)."""

    file: int = 0
    offset: int = 0
    line: int = 0


class Reject(NamedTuple):
    """A document that was left out: the line where it starts (from 1; of parquet the row),
    the reason, and its first characters."""

    file: str
    line: int
    reason: str
    start: str = ""


@dataclass
class Block:
    """Whole documents, undecoded.

    kind: "jsonl", "rows" (of parquet), "paragraphs" (documents separated by blank lines) or "files"
    (whole ones). parts: (path, lines before it in the file, bytes or rows); one, but for "files".
    next: the cursor behind the block. num_bytes: its share of the inputs' size on disk.
    """

    kind: str
    parts: list[tuple[str, int, bytes | list]]
    next: Cursor
    num_bytes: int
    rejects: list[Reject] = field(default_factory=list)


def read_blocks(
    files: Sequence[InputFile], keys: Sequence[str], text_documents: str, start: Cursor
) -> Iterator[Block]:
    """All blocks from a cursor on, in the order of the inputs.

    keys: columns of parquet. text_documents: "file" (a plain text file is one document) or
    "blank-line". GLMError where a file cannot be read to its end.
    """
    whole = Block("files", [], start, 0)
    cursor = start
    for index in range(start.file, len(files)):
        file = files[index]
        is_whole = file.format == "text" and text_documents == "file"
        if whole.num_bytes and (not is_whole or _size(whole) >= BLOCK_BYTES):
            yield whole
            whole = Block("files", [], cursor, 0)
        try:
            if is_whole:
                _add_file(whole, file, Cursor(index + 1))
            elif file.format == "parquet":
                yield from _read_rows(file, index, keys, cursor)
            else:
                yield from _read_lines(file, index, cursor)
        except (OSError, EOFError) as error:
            raise GLMError(
                f"--input {file.path}: cannot be read to its end ({error or type(error).__name__})"
                "; repair or remove it and run the same command again"
            ) from error
        cursor = Cursor(index + 1)
    if whole.num_bytes:
        yield whole


def _size(block: Block) -> int:
    return sum(len(data) for _, _, data in block.parts)


def _too_long(path: str, line: int, start: bytes) -> Reject:
    reason = f"document longer than {MAX_DOCUMENT_BYTES} bytes"
    return Reject(path, line, reason, start[:200].decode(errors="replace"))


def _add_file(block: Block, file: InputFile, after: Cursor) -> None:
    with open_bytes(file) as (stream, _):
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        block.rejects.append(_too_long(file.path, 1, data))
    else:
        block.parts.append((file.path, 0, data))
    block.next = after
    # An empty file counts too, or a block of empty files alone would never be handed on.
    block.num_bytes += max(1, file.num_bytes)


def _read_lines(file: InputFile, index: int, start: Cursor) -> Iterator[Block]:
    kind = "jsonl" if file.format == "jsonl" else "paragraphs"
    separator = LINE_END if kind == "jsonl" else BLANK_LINES
    with open_bytes(file) as (stream, disk):
        _seek(stream, start.offset, file)
        seen_on_disk = disk.tell()
        offset, line, rest, rejects = start.offset, start.line, b"", []
        while True:
            # Growing reads, so that a document of many blocks is not copied over and over.
            more = stream.read(max(BLOCK_BYTES, len(rest)))
            data = rest + more
            cut = _last_end(separator, data) if more else len(data)
            if more and not cut and len(data) > MAX_DOCUMENT_BYTES:
                rejects.append(_too_long(file.path, line + 1, data))
                num_skipped, num_lines, rest = _skip_document(stream, data, separator)
                offset, line = offset + num_skipped, line + num_lines
                continue
            rest = data[cut:]
            if cut or not more:
                part = (file.path, line, data[:cut])
                offset, line = offset + cut, line + data.count(b"\n", 0, cut)
                after = Cursor(index, offset, line) if more else Cursor(index + 1)
                now_on_disk = disk.tell()
                yield Block(kind, [part], after, now_on_disk - seen_on_disk, rejects)
                seen_on_disk, rejects = now_on_disk, []
            if not more:
                return


def _seek(stream: BinaryIO, offset: int, file: InputFile) -> None:
    if not file.compression:
        stream.seek(offset)
        return
    while offset:
        if not (data := stream.read(min(offset, BLOCK_BYTES))):
            raise EOFError("it has become shorter")
        offset -= len(data)


def _last_end(separator: re.Pattern[bytes], data: bytes) -> int:
    """The end of the last separator in `data`, 0 where there is none."""
    if separator is LINE_END:
        return data.rfind(b"\n") + 1
    return max((match.end() for match in separator.finditer(data)), default=0)


def _skip_document(
    stream: BinaryIO, data: bytes, separator: re.Pattern[bytes]
) -> tuple[int, int, bytes]:
    """Reads on to the end of a document; how many bytes and lines it has, what follows it."""
    num_bytes = num_lines = 0
    while not (match := separator.search(data)):
        tail = data[-SKIP_OVERLAP:]
        num_bytes += len(data) - len(tail)
        num_lines += data.count(b"\n", 0, len(data) - len(tail))
        if not (more := stream.read(BLOCK_BYTES)):
            return num_bytes + len(tail), num_lines + tail.count(b"\n"), b""
        data = tail + more
    end = match.end()
    return num_bytes + end, num_lines + data.count(b"\n", 0, end), data[end:]


def _read_rows(
    file: InputFile, index: int, keys: Sequence[str], start: Cursor
) -> Iterator[Block]:
    seen_on_disk = 0
    for line, rows, share in read_row_batches(file.path, keys, start.line, BLOCK_BYTES):
        end_on_disk = int(file.num_bytes * share)
        after = Cursor(index, 0, line + len(rows)) if share < 1 else Cursor(index + 1)
        yield Block("rows", [(file.path, line, rows)], after, end_on_disk - seen_on_disk)
        seen_on_disk = end_on_disk
