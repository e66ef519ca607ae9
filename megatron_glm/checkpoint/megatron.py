"""Megatron's torch_dist checkpoints, read tensor by tensor by one process without a GPU.

`latest_checkpointed_iteration.txt` names `iter_XXXXXXX/` (or `release/`). In it `.metadata` says
which chunk of which tensor lies where in the `.distcp` files, whatever the tensor, pipeline and
data parallel sizes of the run were; each chunk is a torch.save file of its own. Layers are stacked
along a first dimension, or named one by one.
"""

import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors
from megatron_glm.checkpoint.torch_file import TorchFile, empty

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_STATE = "common_state/shard_0_1"
LAYERS = "decoder.layers."
# What a run stores beside its weights.
_NOT_WEIGHTS = re.compile(
    r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine|common_state/|.*\._extra_state(/|$)"
)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class MegatronCheckpoint:
    """One iteration of a torch_dist checkpoint, of any layout of the run that saved it.

    iteration: which one; the one that the tracker file names by default. CheckpointError says what
    is missing, damaged or not GLM's. Nothing in the files is executed.
    """

    def __init__(self, directory: str | Path, iteration: int | None = None):
        self.directory = Path(directory)
        self._folder = self._find(iteration)
        metadata = _read_metadata(self._folder / ".metadata")
        self._chunks: dict[str, list] = {}
        for index, place in metadata.storage_data.items():
            self._chunks.setdefault(index.fqn, []).append((index.offset, place))
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if hasattr(entry, "chunks") and not _NOT_WEIGHTS.match(name)
        }
        common = self._read_common_state()
        self.args: Namespace = common["args"]
        self.iteration: int = common.get("iteration", 0)
        self.settings = self._read_settings()
        self.dtype = self._check()
        self.bits, self.scales = None, {}

    def read(self, tensor: Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A whole tensor."""
        name, layer = self._stored_name(tensor)
        whole = empty(tensor.shape(self.settings.dimensions), self.dtype, memory)
        covered = 0
        for offset, place in self._chunks.get(name, ()):
            offset = tuple(offset)
            if layer is not None and offset[0] != layer:
                continue
            covered += self._read_chunk(name, offset, place, whole, layer is not None)
        if covered != whole.numel():
            raise MissingTensorError(
                f"{self._folder}: {covered} of {whole.numel()} elements of {name} are stored; the "
                "save was not finished"
            )
        return whole

    def _read_chunk(
        self, name: str, offset: tuple[int, ...], place: Any, whole: torch.Tensor, stacked: bool
    ) -> int:
        file = TorchFile(self._path(place), place.offset, place.length)
        if not isinstance(file.content, torch.Tensor):
            raise CorruptFileError(f"{file.path}: {name} is not stored as a tensor")
        stored = file.stored(file.content)
        shape = tuple(stored.shape)
        if stacked:
            offset, lead, shape = offset[1:], shape[:1], shape[1:]
            if lead != (1,):
                raise ShapeError(f"{file.path}: a chunk of {name} spans several layers")
        fits = len(shape) == whole.dim() == len(offset) and all(
            start + size <= full
            for start, size, full in zip(offset, shape, whole.shape, strict=True)
        )
        if not fits or stored.dtype != whole.dtype:
            raise ShapeError(
                f"{file.path}: the chunk of {name} at {list(offset)} is {stored.dtype} "
                f"{list(shape)}, which does not fit into {whole.dtype} {list(whole.shape)}"
            )
        region = whole
        for dim, (start, size) in enumerate(zip(offset, shape, strict=True)):
            region = region.narrow(dim, start, size)
        stored.read_into([region])
        return region.numel()

    def _stored_name(self, tensor: Tensor) -> tuple[str, int | None]:
        """The name under which a tensor is stored, and its place in a stack of layers if it is."""
        name = tensor.name(Format.MEGATRON)
        stacked = tensor.row.megatron.replace("layers.{}.", "layers.")
        if tensor.layer is not None and name not in self._tensors and stacked in self._tensors:
            return stacked, tensor.layer
        return name, None

    def _find(self, iteration: int | None) -> Path:
        if iteration is not None:
            name = f"iter_{iteration:07d}"
        else:
            tracker = self.directory / TRACKER
            try:
                text = tracker.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{tracker}: cannot be read ({error}); a Megatron checkpoint names its latest "
                    "iteration there"
                ) from None
            if text != "release" and not re.fullmatch(r"\d+", text):
                raise CheckpointError(f"{tracker}: holds {text[:40]!r}, not an iteration")
            name = text if text == "release" else f"iter_{int(text):07d}"
        folder = self.directory / name
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; --load should hold that iteration")
        if not (folder / ".metadata").is_file():
            raise CheckpointError(
                f"{folder}: has no .metadata, so its save was not finished or it is not of "
                "--ckpt-format torch_dist; give an older one by --ckpt-step"
            )
        return folder

    def _path(self, place: Any) -> Path:
        name = place.relative_path
        # The name comes from a file that anyone may have written.
        if not isinstance(name, str) or Path(name).name != name:
            raise CorruptFileError(f"{self._folder}/.metadata: names {name!r}, outside its folder")
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(f"{self._folder / name}: is compressed; save without extensions")
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, though .metadata names it; fetch all files")
        return path

    def _read_common_state(self) -> dict[str, Any]:
        # Megatron's own list of what its arguments are made of. Not as a context: at its end torch
        # would take away what Megatron's own loads need.
        from megatron.core.safe_globals import register_safe_globals

        register_safe_globals()
        chunks = self._chunks.get(COMMON_STATE)
        if (self._folder / "common.pt").is_file():
            content = TorchFile(self._folder / "common.pt").content
        elif chunks:
            place = chunks[0][1]
            content = TorchFile(self._path(place), place.offset, place.length).content
            content = content[0] if isinstance(content, list) and content else None
        else:
            raise CheckpointError(f"{self._folder}: holds neither common_state nor common.pt")
        if not isinstance(content, dict) or not isinstance(content.get("args"), Namespace):
            raise CheckpointError(f"{self._folder}: no arguments of a run are stored in it")
        return content

    def _read_settings(self) -> Settings:
        flags = getattr(self.args, "glm_settings", None)
        if not isinstance(flags, dict):
            raise CheckpointError(
                f"{self._folder}: holds no GLM settings, so it was not written by pretrain_glm.py "
                "or tools/convert_checkpoint.py"
            )
        return Settings.from_flags(flags, getattr(self.args, "seq_length", 2048), str(self._folder))

    def _check(self) -> torch.dtype:
        dimensions = self.settings.dimensions
        unused, dtypes = dict(self._tensors), set()
        for tensor in tensors(dimensions):
            name, layer = self._stored_name(tensor)
            if name not in self._tensors:
                raise MissingTensorError(f"{self._folder}: lacks {name}")
            shape = tensor.shape(dimensions)
            if layer is not None:
                shape = (dimensions.num_layers, *shape)
            entry = self._tensors[name]
            if tuple(entry.size) != shape:
                raise ShapeError(
                    f"{self._folder}: {name} is {list(entry.size)}, should be {list(shape)} by the "
                    "settings stored with it"
                )
            dtypes.add(entry.properties.dtype)
            unused.pop(name, None)
        if unused:
            raise UnknownTensorError(f"{self._folder}: {min(unused)} is not a tensor of GLM")
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
            raise CorruptFileError(
                f"{self._folder}: holds weights of types {sorted(map(str, dtypes))}"
            )
        return dtypes.pop()


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, and refuses to make anything else."""

    _CLASSES = {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        # What earlier releases of Megatron stored along.
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _read_metadata(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_data.items(), metadata.state_dict_metadata.items()  # noqa: B018
        return metadata
    except pickle.UnpicklingError as error:
        raise CorruptFileError(
            f"{path}: holds {error} where only the index of a checkpoint belongs; refused, since "
            "loading it could run code of its author"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        raise CorruptFileError(f"{path}: damaged ({type(error).__name__}: {error})") from None
