"""Opens Megatron's .bin/.idx files, and refuses damaged or foreign ones with one clear line."""

import json
import logging
import os
import struct
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.utils import log_single_rank

from megatron_glm.data.config import DataError

logger = logging.getLogger(__name__)

FINGERPRINT_SUFFIX = ".tokenizer.json"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 22
_REBUILD = "make the data again with tools/preprocess_data.py"


def open_indexed_dataset(prefix: str, tokenizer: Any, mmap: bool = True) -> IndexedDataset:
    """Opens PREFIX.bin and PREFIX.idx.

    Raises DataError where a file is missing or truncated, where the two do not belong together, or
    where PREFIX.tokenizer.json names another tokenizer than the one given.
    """
    check_index(prefix)
    check_fingerprint(prefix, tokenizer)
    return IndexedDataset(prefix, multimodal=False, mmap=mmap)


def check_index(prefix: str) -> None:
    """Raises DataError unless PREFIX.idx is whole, consistent, and describes all of PREFIX.bin."""
    for path in (f"{prefix}.idx", f"{prefix}.bin"):
        if not os.path.isfile(path):
            raise DataError(
                f"{path}: no such file; --data-path takes the prefix that tools/preprocess_data.py "
                "wrote, without .bin or .idx"
            )
    path, size = f"{prefix}.idx", os.path.getsize(f"{prefix}.idx")
    with open(path, "rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise DataError(f"{path}: truncated at {size} bytes; {_REBUILD}")
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in [kind.value for kind in DType]:
        raise DataError(f"{path}: not an index of Megatron's, version 1; {_REBUILD}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    # Behind the index proper, Megatron may store one byte of mode for each sequence.
    if size not in (expected, expected + num_sequences):
        raise DataError(
            f"{path}: has {size} bytes, its header announces {expected}: truncated or damaged; "
            f"{_REBUILD}"
        )
    if num_sequences == 0:
        raise DataError(f"{path}: holds no document; {_REBUILD}")
    item_size = DType.size(code)
    end = _check_pointers(path, num_sequences, item_size)
    _check_bounds(path, num_sequences, num_bounds)
    bin_size = os.path.getsize(f"{prefix}.bin")
    if bin_size != end:
        raise DataError(
            f"{prefix}.bin: has {bin_size} bytes, {prefix}.idx describes {end}: truncated, or not "
            f"of the same run; {_REBUILD}"
        )


def _check_pointers(path: str, num_sequences: int, item_size: int) -> int:
    """Compares byte offsets with the running sum of lengths; returns the end of the last."""
    lengths = np.memmap(path, np.int32, "r", offset=_HEADER.size, shape=(num_sequences,))
    pointers = np.memmap(
        path, np.int64, "r", offset=_HEADER.size + 4 * num_sequences, shape=(num_sequences,)
    )
    end = 0
    for begin in range(0, num_sequences, _CHUNK):
        chunk = np.asarray(lengths[begin : begin + _CHUNK], dtype=np.int64)
        ends = end + np.cumsum(chunk) * item_size
        is_wrong = (chunk < 0) | (pointers[begin : begin + _CHUNK] != ends - chunk * item_size)
        if is_wrong.any():
            raise DataError(
                f"{path}: sequence {begin + int(is_wrong.argmax())} does not begin where the one "
                f"before it ends: damaged; {_REBUILD}"
            )
        end = int(ends[-1])
    return end


def _check_bounds(path: str, num_sequences: int, num_bounds: int) -> None:
    offset = _HEADER.size + 12 * num_sequences
    bounds = np.memmap(path, np.int64, "r", offset=offset, shape=(num_bounds,))
    is_right = num_bounds > 1 and bounds[0] == 0 and bounds[-1] == num_sequences
    if not is_right or (bounds[1:] < bounds[:-1]).any():
        raise DataError(f"{path}: document bounds are out of order: damaged; {_REBUILD}")


def check_fingerprint(prefix: str, tokenizer: Any) -> None:
    """Raises DataError where the data was made with another tokenizer.

    Data of Megatron's own tool has no fingerprint; it is let through with a warning.
    """
    path = f"{prefix}{FINGERPRINT_SUFFIX}"
    try:
        with open(path, encoding="utf-8") as stream:
            made_with = json.load(stream)
    except FileNotFoundError:
        log_single_rank(
            logger, logging.WARNING,
            f"{path} is missing: cannot tell whether {prefix}.bin was made with this tokenizer",
        )
        return
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); {_REBUILD}") from error
    given = json.loads(json.dumps(tokenizer.fingerprint))
    if made_with != given:
        names = sorted(set(made_with) | set(given)) if isinstance(made_with, dict) else []
        differing = ", ".join(
            f"{name} {made_with.get(name)} against {given.get(name)}"
            for name in names
            if made_with.get(name) != given.get(name)
        )
        raise DataError(
            f"{prefix}.bin was made with another tokenizer than --tokenizer-model names "
            f"({differing}); give that tokenizer, or {_REBUILD}"
        )
