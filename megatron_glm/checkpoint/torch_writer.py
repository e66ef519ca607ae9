"""Writes torch.save files a block at a time, so that a file may be larger than memory.

The format is torch.save's: an uncompressed zip archive with `data.pkl`, which describes the
tensors, and one record of bytes a tensor. torch.load reads it, memory-mapped too.
"""

import contextlib
import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from isal.isal_zlib import crc32

from megatron_glm.checkpoint.torch_file import byte_view, row_blocks
from megatron_glm.checkpoint.write_behind import create

# torch.load maps records into memory, which wants them aligned.
_ALIGNMENT = 64


class TensorSpec(NamedTuple):
    """The type and shape of a tensor that is to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _Section:
    """What is behind the present end of a file, as a file that begins there."""

    def __init__(self, file: BinaryIO):
        self._file, self._start = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = self._start if whence == io.SEEK_SET else 0
        return self._file.seek(base + offset, whence) - self._start


class _Storage(NamedTuple):
    """Stands for a record of bytes while `data.pkl` is written."""

    key: str
    spec: TensorSpec


class _Tensor:
    """Stands for a tensor while `data.pkl` is written."""

    def __init__(self, storage: _Storage):
        self.storage = storage

    def __reduce__(self):
        shape = self.storage.spec.shape
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (
            self.storage, 0, shape, stride, False, OrderedDict(),
        )  # fmt: skip


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        # The typed storage class is how the format spells a type.
        storage_type = torch.storage._dtype_to_storage_type_map()[obj.spec.dtype]
        size = torch.Size(obj.spec.shape).numel()
        return "storage", getattr(torch, storage_type), obj.key, "cpu", size


class TorchWriter:
    """A torch.save file, written in the order of `specs`.

    file: a path, or a binary file, behind whose present end the archive is put. content: makes what
    torch.load is to return from stand-ins of the tensors; {"module": {name: tensor}} by default.
    A context manager; `write` takes the tensors one after another, each as views that follow one
    another along its first dimension. The file is readable only after a close without error.
    """

    def __init__(
        self,
        file: Path | BinaryIO,
        specs: dict[str, TensorSpec],
        content: Callable[[dict[str, Any]], Any] = lambda tensors: {"module": tensors},
    ):
        self._name, self._root = str(file), "archive"
        self._opened = contextlib.ExitStack()
        if isinstance(file, Path):
            self._root = file.stem
            file = self._opened.enter_context(create(file))
        else:
            file = _Section(file)
        keys = {name: str(i) for i, name in enumerate(specs)}
        self._left = [(name, keys[name], spec) for name, spec in reversed(specs.items())]
        self._zip = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED)
        stand_ins = {name: _Tensor(_Storage(keys[name], spec)) for name, spec in specs.items()}
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(content(stand_ins))
        self._write_text("data.pkl", buffer.getvalue())
        self._write_text("byteorder", b"little")

    def _write_text(self, name: str, content: bytes) -> None:
        # A ZipInfo of its own has no time in it: the same tensors give the same file.
        self._zip.writestr(zipfile.ZipInfo(f"{self._root}/{name}"), content)

    def write(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Writes the next tensor; ValueError if it is not the next one or of another size."""
        expected, key, spec = self._left.pop()
        if name != expected:
            raise ValueError(f"{self._name}: {name} written where {expected} is due")
        entry = zipfile.ZipInfo(f"{self._root}/data/{key}")
        entry.file_size = spec.num_bytes
        # The margin with which zipfile itself decides.
        zip64 = spec.num_bytes * 1.05 > zipfile.ZIP64_LIMIT
        entry.extra = self._padding(entry.filename, zip64)
        written = self._write_record(entry, zip64, pieces)
        if written != spec.num_bytes:
            raise ValueError(f"{name}: {written} bytes written, {spec.num_bytes} announced")

    def _write_record(
        self, entry: zipfile.ZipInfo, zip64: bool, pieces: Iterable[torch.Tensor]
    ) -> int:
        """What `ZipFile.open(entry, "w")` would write, with a checksum that costs little."""
        file = self._zip.fp
        entry.header_offset, entry.compress_size = file.tell(), entry.file_size
        entry.CRC, entry.external_attr = 0, 0o600 << 16
        file.write(entry.FileHeader(zip64))
        written = 0
        for piece in pieces:
            for block in row_blocks(piece):
                view = byte_view(block.contiguous())
                entry.CRC = crc32(view, entry.CRC)
                written += file.write(view)
        end = file.tell()
        file.seek(entry.header_offset)
        file.write(entry.FileHeader(zip64))
        file.seek(end)
        self._zip.filelist.append(entry)
        self._zip.NameToInfo[entry.filename] = entry
        self._zip.start_dir = end
        return written

    def _padding(self, filename: str, zip64: bool) -> bytes:
        """An extra field, with the id that torch uses, that moves the bytes to an aligned place."""
        header = zipfile.sizeFileHeader + len(filename) + (20 if zip64 else 0)
        start = self._zip.fp.tell() + header + 4
        count = -start % _ALIGNMENT
        return b"FB" + count.to_bytes(2, "little") + b"Z" * count

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            if self._left:
                raise ValueError(f"{self._name}: {self._left[-1][0]} was never written")
            self._write_text("version", b"3\n")
            self._zip.close()
            self._opened.close()
        else:
            # Records are missing, so nothing takes the file for a whole one.
            with contextlib.suppress(OSError), self._opened:
                self._zip.close()
