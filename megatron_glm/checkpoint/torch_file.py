"""Tensors inside torch.save files, read one at a time and never executed.

torch.load would map or copy the whole file. Here only its index is loaded, onto the meta device
and with `weights_only`, and each tensor is read from its place in the file when it is wanted,
straight into the memory that it is for.
"""

import bisect
import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from isal.isal_zlib import crc32

from megatron_glm.checkpoint.errors import CorruptFileError

# Bytes read, converted or written at once: what a conversion needs beyond the tensor in hand.
BLOCK_BYTES = 4 << 20


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, shared with it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, memory: torch.Tensor | None = None
) -> torch.Tensor:
    """A tensor of any content on the CPU, at the beginning of `memory` (uint8 [bytes]) if given."""
    if memory is None:
        return torch.empty(shape, dtype=dtype)
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return memory[:num_bytes].view(dtype).view(shape)


def row_blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor cut along its first dimension into views of at most BLOCK_BYTES, or one row."""
    if tensor.dim() == 0:
        return [tensor]
    row_bytes = max(1, tensor[:1].numel() * tensor.element_size())
    return list(tensor.split(max(1, BLOCK_BYTES // row_bytes)))


def convert_rows(
    convert: Callable[[torch.Tensor], torch.Tensor], source: torch.Tensor, target: torch.Tensor
) -> None:
    """Fills a tensor with what `convert` makes of the rows of another, a block at a time."""
    start = 0
    for block in row_blocks(source):
        target[start : start + len(block)] = convert(block)
        start += len(block)


@dataclass(frozen=True)
class StoredTensor:
    """Where a contiguous tensor lies in a file; `crc32` is that of its bytes, if it is known."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    crc32: int | None = None

    def read(self, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor on the CPU; `memory` as in `empty`."""
        result = empty(self.shape, self.dtype, memory)
        self.read_into([result])
        return result

    def read_into(self, destinations: list[torch.Tensor]) -> None:
        """Fills the destinations, which follow one another along the first dimension of the stored
        tensor and may be views. CorruptFileError on a short file or a wrong checksum."""
        crc = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            for destination in destinations:
                for block in row_blocks(destination):
                    buffer = (
                        block
                        if block.is_contiguous()
                        else torch.empty_like(block, memory_format=torch.contiguous_format)
                    )
                    view = byte_view(buffer)
                    self._fill(file, view)
                    crc = crc32(view, crc)
                    if buffer is not block:
                        block.copy_(buffer)
        if self.crc32 is not None and crc != self.crc32:
            raise CorruptFileError(
                f"{self.path}: the checksum of the tensor at byte {self.offset} is {crc:08x}, its "
                f"file says {self.crc32:08x}: the file was damaged; fetch it again"
            )

    def _fill(self, file: io.FileIO, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CorruptFileError(
                    f"{self.path}: ends inside a tensor; the file is truncated, fetch it again"
                )
            done += count


class FileSlice(io.RawIOBase):
    """Bytes [start, start + length) of a file as a file of its own."""

    def __init__(self, path: Path, start: int, length: int):
        self._file = open(path, "rb", buffering=0)
        self._start, self._length, self._position = start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = (0, self._position, self._length)[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class TorchFile:
    """The index of a torch.save file, or of one that lies inside another file.

    `content` is what was saved, its tensors on the meta device; `stored(tensor)` says where such a
    tensor's data lies. `root` is the folder inside the archive: the stem of the name that the file
    was saved under, or "archive". CorruptFileError for anything but a whole file of plain data.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None):
        self.path, self._start = path, start
        if length is None:
            length = path.stat().st_size
        with FileSlice(path, start, length) as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    self._entries = sorted(archive.infolist(), key=lambda e: e.header_offset)
                file.seek(0)
                self.content = torch.load(file, map_location="meta", weights_only=True)
            except pickle.UnpicklingError as error:
                raise CorruptFileError(
                    f"{path}: holds more than tensors and plain data, so loading it could run code "
                    f"of its author; refused ({_reason(error)})"
                ) from None
            except Exception as error:  # torch raises many kinds on a damaged file
                raise CorruptFileError(
                    f"{path}: not a whole torch.save file ({_reason(error)}); fetch it again, or "
                    "save it again with a PyTorch of 1.6 or later"
                ) from None
        self._offsets = [entry.header_offset for entry in self._entries]
        self.root = self._entries[0].filename.split("/")[0]

    def stored(self, tensor: torch.Tensor) -> StoredTensor:
        """The place of a tensor of `content`."""
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        if offset is None or not tensor.is_contiguous():
            raise CorruptFileError(
                f"{self.path}: a tensor of shape {tuple(tensor.shape)} is a strided view; save the "
                "file again after .contiguous()"
            )
        entry = self._entries[bisect.bisect_right(self._offsets, offset) - 1]
        whole = tensor.numel() * tensor.element_size() == entry.file_size
        return StoredTensor(
            self.path,
            self._start + offset + tensor.storage_offset() * tensor.element_size(),
            tensor.dtype,
            tuple(tensor.shape),
            entry.CRC if whole else None,
        )


def _reason(error: Exception) -> str:
    """The telling part of a loader's message, which may run over a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "global" in line.lower()]
    return ((telling or lines or [type(error).__name__])[0])[:200]
