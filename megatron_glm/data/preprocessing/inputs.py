"""Which files are read, in what order and format, and how their bytes are opened."""

import argparse
import glob
import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_glm.errors import GLMError

FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text", ".md": "text", ".rst": "text",
}  # fmt: skip
FORMATS = ("jsonl", "parquet", "text")
COMPRESSIONS = (".gz", ".zst")
READ_BYTES = 1 << 20
# Little, as it may become a thousand times as much.
COMPRESSED_READ_BYTES = 1 << 16


@dataclass(frozen=True)
class InputFile:
    """A file to read. num_bytes and mtime_ns, as they were when it was found, tell whether it is
    still the same when a run is resumed."""

    path: str
    format: str
    compression: str
    num_bytes: int
    mtime_ns: int


def add_input_flags(parser: argparse._ActionsContainer) -> None:
    """The flags of a tool that reads texts: --input, --input-format and --json-keys."""
    parser.add_argument(
        "--input", nargs="+", required=True, help="files, folders and globs; .gz and .zst are "
        "decompressed",
    )
    parser.add_argument(
        "--input-format", choices=FORMATS, help="format of all inputs, whatever their suffix"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys, or parquet columns, to take text "
        "from; default: text",
    )


def find_inputs(patterns: Iterable[str], input_format: str | None = None) -> list[InputFile]:
    """The files that --input names: files, folders (searched through) and globs.

    Order: as given; within a folder or a glob by name. Without `input_format` the format follows
    from the suffix; in a folder or glob files of other suffixes are passed over, and in a folder
    .json too, which there is rarely a corpus. GLMError where nothing is found, a format is unknown,
    or a file would be read twice.
    """
    found: list[InputFile] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            paths, must_match = [pattern], True
        elif os.path.isdir(pattern):
            paths, must_match = _files_below(pattern, input_format), False
        else:
            paths = sorted(p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p))
            must_match = False
        files = [file for path in paths if (file := _describe(path, input_format, must_match))]
        if not files:
            raise GLMError(
                f"--input {pattern}: no such file, or no file in it ending in "
                f"{', '.join(FORMAT_OF_SUFFIX)} (and {' or '.join(COMPRESSIONS)}); name the format "
                "of files with other suffixes by --input-format"
            )
        found += files
    seen: set[str] = set()
    for file in found:
        if (real := os.path.realpath(file.path)) in seen:
            raise GLMError(f"--input {file.path}: given twice, its text would be in the data twice")
        seen.add(real)
    return found


def _files_below(folder: str, input_format: str | None) -> list[str]:
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if input_format or path.suffix != ".json")


def _describe(path: str, input_format: str | None, must_match: bool) -> InputFile | None:
    stem, suffix = os.path.splitext(path.lower())
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    file_format = input_format or FORMAT_OF_SUFFIX.get(suffix)
    if file_format is None:
        if must_match:
            raise GLMError(
                f"--input {path}: the suffix {suffix!r} tells no format; give --input-format, one "
                f"of {', '.join(FORMATS)}"
            )
        return None
    if file_format == "parquet" and compression:
        raise GLMError(f"--input {path}: parquet is compressed inside; decompress the file first")
    stat = os.stat(path)
    return InputFile(path, file_format, compression, stat.st_size, stat.st_mtime_ns)


@contextmanager
def open_bytes(file: InputFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed bytes of a file, and the file on disk, whose `tell()` shows the progress.

    Reading raises OSError or EOFError where compressed data is damaged or cut off.
    """
    with open(file.path, "rb") as raw:
        if file.compression == ".gz":
            # 31: with gzip's header and trailer, of which the checksum is compared.
            reader = _FramesReader(raw, lambda: zlib.decompressobj(31), zlib.error)
        elif file.compression == ".zst":
            reader = _FramesReader(raw, *_zstd(file.path))
        else:
            yield raw, raw
            return
        yield io.BufferedReader(reader, READ_BYTES), raw


def _zstd(path: str) -> tuple[Callable[[], Any], type[Exception]]:
    try:
        import zstandard
    except ImportError as error:
        raise GLMError(f"--input {path}: reading .zst needs `pip install zstandard`") from error
    # The largest window of `zstd --long=31`.
    context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return context.decompressobj, zstandard.ZstdError


class _FramesReader(io.RawIOBase):
    """Reads all members of a gzip file or frames of a zstd file, to the last byte.

    The libraries' own readers take a truncated zstd file, and a gzip file of which the rest is
    zeros, for whole ones.
    """

    def __init__(
        self, file: BinaryIO, new_frame: Callable[[], Any], error: type[Exception]
    ) -> None:
        self._file = file
        self._new_frame = new_frame
        self._error = error
        self._frame = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame and self._frame.eof else b""
            data = data or self._file.read(COMPRESSED_READ_BYTES)
            if not data:
                if self._frame and not self._frame.eof:
                    raise EOFError("the file ends too early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


class InputHash:
    """A hash of the inputs that a run has consumed, extended file by file."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update_all(self, files: Iterable[InputFile]) -> "InputHash":
        """Takes in the next files."""
        for file in files:
            self._hash.update(repr(astuple(file)).encode(errors="surrogateescape"))
        return self

    def hexdigest(self) -> str:
        """The hash of all files taken in so far."""
        return self._hash.hexdigest()
