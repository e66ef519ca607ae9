"""The format of Megatron's indexed datasets: written from streams, checked before use.

Megatron's own writer keeps every sequence length in a Python list and its reader believes what the
index says; here the index is written in constant memory, and `check_indexed_dataset` finds out
whether both files are whole before a run starts.

A dataset PREFIX is two files. PREFIX.bin holds the ids of all sequences, one behind the other.
PREFIX.idx holds, little-endian: the 9 bytes of `MAGIC`, version uint64, dtype code uint8, number
of sequences n uint64, number of document bounds d uint64, lengths int32 [n] in tokens, pointers
int64 [n] in bytes, bounds int64 [d] in sequences, of which the first is 0 and the last n.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_glm.errors import GLMError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
# The codes of megatron.core.datasets.indexed_dataset.DType that can hold token ids.
DTYPE_CODES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
# Numbers handled at once: memory stays flat whatever the size of the index.
CHUNK = 1 << 20
# Bytes at either end of a .bin that every start compares, however large the file is.
END_BYTES = 1 << 20


class IndexedDatasetError(GLMError):
    """A .bin/.idx pair that is missing or damaged; the message names the file."""


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type that Megatron's `DType.optimal_dtype` chooses for ids below `vocab_size`."""
    return np.uint16 if vocab_size < 65500 else np.int32


def write_index(path: Path, dtype: type[np.integer], lengths_file: Path, bounds_file: Path) -> int:
    """Writes an .idx file from raw files of sequence lengths int32 [n] and of sequences per
    document int32 [documents]; returns its CRC-32."""
    num_sequences = lengths_file.stat().st_size // 4
    num_documents = bounds_file.stat().st_size // 4
    code = next(code for code, known in DTYPE_CODES.items() if known is dtype)
    crc = 0
    with path.open("wb") as out:

        def put(data: bytes) -> None:
            nonlocal crc
            crc = zlib.crc32(data, crc)
            out.write(data)

        put(HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1))
        for lengths in _chunks(lengths_file):
            put(lengths.tobytes())
        _put_sums(put, lengths_file, np.dtype(dtype).itemsize, with_last=False)
        _put_sums(put, bounds_file, 1, with_last=True)
        out.flush()
        os.fsync(out.fileno())
    return crc


def _chunks(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as stream:
        while data := stream.read(4 * CHUNK):
            yield np.frombuffer(data, dtype="<i4")


def _put_sums(
    put: Callable[[bytes], None], path: Path, scale: int, with_last: bool
) -> None:
    """Puts scale * (the sum of all values before each one), int64, and their total if asked."""
    total = 0
    for values in _chunks(path):
        ends = np.cumsum(values, dtype="<i8") * scale + total
        put(np.concatenate(([total], ends[:-1])).astype("<i8").tobytes())
        total = int(ends[-1])
    if with_last:
        put(struct.pack("<q", total))


def check_indexed_dataset(prefix: str | Path, contents: bool = False) -> None:
    """Finds out whether PREFIX.bin and PREFIX.idx are whole and belong together.

    Reads the index in constant memory. Where preprocessing has left PREFIX.checksums.json, the
    index must have the CRC-32 that it tells, and the .bin one of its first and last `END_BYTES`,
    which tells the file of another dataset and the hole of a copy that was cut off; with `contents`
    the .bin is read whole. IndexedDatasetError says what is wrong with which file.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, data):
        if not path.is_file():
            raise IndexedDatasetError(
                f"{path}: no such file; give the path without suffix that tools/preprocess_data.py "
                "printed"
            )
    num_bytes = _check_index(idx)
    if data.stat().st_size != num_bytes:
        raise _damaged(data, f"{data.stat().st_size} bytes, and not the {num_bytes} of its index")
    sums = checksums_path(prefix)
    if sums.exists():
        _check_sums(sums, idx, data, contents)


def checksums_path(prefix: str | Path) -> Path:
    """Where the checksums of a dataset are."""
    return Path(f"{prefix}.checksums.json")


def _damaged(path: Path, what: str) -> IndexedDatasetError:
    return IndexedDatasetError(f"{path}: {what}; copy it again or repeat the preprocessing")


def _check_index(idx: Path) -> int:
    """The size in bytes that the .bin must have."""
    with idx.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise _damaged(idx, f"{len(header)} bytes, shorter than its header of {HEADER.size}")
    magic, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise _damaged(idx, f"does not start like an index (magic {magic!r}, version {version})")
    if code not in DTYPE_CODES:
        raise _damaged(idx, f"type code {code} is not one of token ids ({sorted(DTYPE_CODES)})")
    size = HEADER.size + 12 * num_sequences + 8 * num_bounds
    if idx.stat().st_size != size:
        raise _damaged(
            idx,
            f"{idx.stat().st_size} bytes, and not the {size} of {num_sequences} sequences and "
            f"{num_bounds} document bounds",
        )
    if not num_sequences or not num_bounds:
        raise _damaged(idx, "holds no sequences")
    raw = np.memmap(idx, mode="r", dtype=np.uint8, offset=HEADER.size)
    lengths = raw[: 4 * num_sequences].view("<i4")
    pointers = raw[4 * num_sequences : 12 * num_sequences].view("<i8")
    bounds = raw[12 * num_sequences :].view("<i8")
    _check_bounds(idx, bounds, num_sequences)
    return _check_pointers(idx, lengths, pointers, np.dtype(DTYPE_CODES[code]).itemsize)


def _check_pointers(idx: Path, lengths: np.ndarray, pointers: np.ndarray, item_size: int) -> int:
    """Each pointer must be the bytes of the sequences before it; returns those of all."""
    total = 0
    for first in range(0, len(lengths), CHUNK):
        here = lengths[first : first + CHUNK].astype(np.int64)
        if (bad := np.flatnonzero(here < 0)).size:
            raise _damaged(idx, f"sequence {first + bad[0]} has length {here[bad[0]]}")
        ends = total + np.cumsum(here) * item_size
        expected = np.concatenate(([total], ends[:-1]))
        found = pointers[first : first + CHUNK]
        if (bad := np.flatnonzero(found != expected)).size:
            at = bad[0]
            raise _damaged(
                idx, f"sequence {first + at} starts at byte {found[at]}, and not {expected[at]}"
            )
        total = int(ends[-1])
    return total


def _check_bounds(idx: Path, bounds: np.ndarray, num_sequences: int) -> None:
    if bounds[0] != 0 or bounds[-1] != num_sequences:
        raise _damaged(
            idx,
            f"its documents go from sequence {bounds[0]} to {bounds[-1]}, and not from 0 to "
            f"{num_sequences}",
        )
    for first in range(0, len(bounds) - 1, CHUNK):
        steps = np.diff(bounds[first : first + CHUNK + 1])
        if (bad := np.flatnonzero(steps < 0)).size:
            raise _damaged(idx, f"document {first + bad[0]} ends before it starts")


def _check_sums(sums: Path, idx: Path, data: Path, contents: bool) -> None:
    checks = [("idx_crc32", idx, crc32_of), ("bin_ends_crc32", data, ends_crc32_of)]
    if contents:
        checks.append(("bin_crc32", data, crc32_of))
    try:
        stored = json.loads(sums.read_text())
        expected = {name: int(stored[name]) for name, _, _ in checks}
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(sums, f"cannot be read ({error!r})") from error
    for name, path, measure in checks:
        if (crc := measure(path)) != expected[name]:
            raise _damaged(path, f"its {name} is {crc}, and not the {expected[name]} in {sums}")


def ends_crc32_of(path: Path) -> int:
    """CRC-32 of the first `END_BYTES` of a file followed by the last."""
    with path.open("rb") as stream:
        crc = zlib.crc32(stream.read(END_BYTES))
        stream.seek(max(0, path.stat().st_size - END_BYTES))
        return zlib.crc32(stream.read(END_BYTES), crc)


def crc32_of(path: Path) -> int:
    """CRC-32 of a file, read in constant memory."""
    crc = 0
    with path.open("rb") as stream:
        while data := stream.read(CHUNK):
            crc = zlib.crc32(data, crc)
    return crc
