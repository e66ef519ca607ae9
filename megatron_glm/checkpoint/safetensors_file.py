"""safetensors files, read a tensor at a time and written a block at a time.

A file is the length of its header (uint64, little-endian), the header as JSON with type, shape and
place of each tensor, and the tensors' bytes. The library's reader maps the whole file and its
writer wants all tensors in memory, which a conversion must not do.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from megatron_glm.checkpoint.errors import CorruptFileError
from megatron_glm.checkpoint.torch_file import StoredTensor, byte_view, row_blocks
from megatron_glm.checkpoint.torch_writer import TensorSpec
from megatron_glm.checkpoint.write_behind import create

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a file lies. CorruptFileError where the file is not whole."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > min(size - 8, _LARGEST_HEADER):
                raise ValueError("the header does not fit into the file")
            header = json.loads(file.read(header_size))
        result, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            spec = TensorSpec(_DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])))
            if first < 0 or min(spec.shape, default=1) < 0 or last - first != spec.num_bytes:
                raise ValueError(f"{name} has {last - first} bytes for {spec}")
            result[name] = StoredTensor(path, 8 + header_size + first, *spec)
            end = max(end, last)
        if 8 + header_size + end != size:
            raise ValueError(f"{8 + header_size + end} bytes announced, {size} there")
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{path}: not a whole safetensors file ({error}); fetch it again"
        ) from None
    return result


class SafetensorsWriter:
    """A safetensors file, written in the order of `specs`; a context manager."""

    def __init__(self, path: Path, specs: dict[str, TensorSpec]):
        self.path = path
        self._left = list(reversed(specs.items()))
        header: dict = {"__metadata__": {"format": "pt"}}
        place = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [place, place + spec.num_bytes],
            }
            place += spec.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)
        self._file: BinaryIO | None = None

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Writes the next tensor; ValueError if it is not the next one or of another size."""
        expected, spec = self._left.pop()
        if name != expected:
            raise ValueError(f"{self.path}: {name} written where {expected} is due")
        written = 0
        for piece in pieces:
            for block in row_blocks(piece):
                written += self._file.write(byte_view(block.contiguous()))
        if written != spec.num_bytes:
            raise ValueError(f"{name}: {written} bytes written, {spec.num_bytes} announced")

    def __enter__(self) -> "SafetensorsWriter":
        self._file = create(self.path)
        self._file.write(len(self._header).to_bytes(8, "little") + self._header)
        return self

    def __exit__(self, error_type, *_) -> None:
        self._file.close()
        if error_type is None and self._left:
            raise ValueError(f"{self.path}: {self._left[-1][0]} was never written")
