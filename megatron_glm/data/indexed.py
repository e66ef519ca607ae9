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


def _chunks(path: Path):
    with path.open("rb") as stream:
        while data := stream.read(4 * CHUNK):
            yield np.frombuffer(data, dtype="<i4")


def _put_sums(put, path: Path, scale: int, with_last: bool) -> None:
    """Puts scale * (the sum of all values before each one), int64, and their total if asked."""
    total = 0
    for values in _chunks(path):
        ends = np.cumsum(values, dtype="<i8") * scale + total
        put(np.concatenate(([total], ends[:-1])).astype("<i8").tobytes())
        total = int(ends[-1])
    if with_last:
        put(struct.pack("<q", total))
