"""Writes Megatron torch_dist checkpoints that `pretrain_glm.py --load` opens at any layout."""

import io
import json
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_glm.checkpoint.megatron import COMMON_STATE, TRACKER
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors
from megatron_glm.checkpoint.torch_writer import TensorSpec, TorchWriter
from megatron_glm.checkpoint.write_behind import create

DATA_FILE = "__0_0.distcp"
# Megatron's linears store an (empty) state beside their weights, and its loader asks for it.
_LINEARS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


class MegatronWriter:
    """A torch_dist checkpoint to be, of weights alone.

    iteration: None writes what Megatron calls a release, which is loaded without optimizer and
    random states and trained from iteration 0; a number writes that iteration, to be loaded with
    --no-load-optim and --no-load-rng (or --finetune).
    args: of the run that trained the weights, if it is known; its settings are replaced.
    """

    def __init__(
        self,
        settings: Settings,
        dtype: torch.dtype,
        iteration: int | None = None,
        args: Namespace | None = None,
    ):
        self.settings, self.dtype, self.iteration = settings, dtype, iteration
        self._args = _arguments(settings, dtype, args, iteration)

    @property
    def num_bytes(self) -> int:
        """Size of the result, without a few kB a tensor."""
        sizes = (
            torch.Size(tensor.shape(self.settings.dimensions)).numel()
            for tensor in tensors(self.settings.dimensions)
        )
        return self.dtype.itemsize * sum(sizes)

    def write(self, folder: Path, read: Callable[[Tensor], torch.Tensor]) -> None:
        """Writes the tracker file and the iteration into a folder; `read` is called once a
        tensor."""
        released = self.iteration is None
        name = "release" if released else f"iter_{self.iteration:07d}"
        target = folder / name
        target.mkdir()
        common = {
            "args": self._args,
            "checkpoint_version": 3.0,
            "iteration": self.iteration or 0,
            "num_floating_point_operations_so_far": 0,
            # How Megatron is to name what it looks for: layers stacked along a first dimension.
            "content_metadata": {"singleton_local_shards": False},
        }
        with create(target / DATA_FILE) as file:
            writer = _ChunkWriter(file)
            writer.write_object(COMMON_STATE, [common])
            self._write_extra_states(writer)
            for tensor in tensors(self.settings.dimensions):
                self._write_tensor(writer, tensor, read(tensor))
        writer.write_index(target / ".metadata")
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (target / "metadata.json").write_text(json.dumps(backend))
        (folder / TRACKER).write_text("release" if released else str(self.iteration))

    def _write_extra_states(self, writer: "_ChunkWriter") -> None:
        layers = self.settings.dimensions.num_layers
        for linear in _LINEARS:
            for layer in range(layers):
                name = f"decoder.layers.{linear}._extra_state/shard_{layer}_{layers}"
                writer.write_object(name, [None])

    def _write_tensor(self, writer: "_ChunkWriter", tensor: Tensor, value: torch.Tensor) -> None:
        if tensor.layer is None:
            writer.write_chunk(tensor.name(Format.MEGATRON), value)
        else:
            name = tensor.row.megatron.replace("layers.{}.", "layers.")
            writer.write_chunk(name, value, tensor.layer, self.settings.dimensions.num_layers)


class _ChunkWriter:
    """One data file of a torch.distributed.checkpoint and its index.

    The library's own writer keeps every tensor that it has written until the end.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._state: dict[str, BytesStorageMetadata | TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def write_object(self, name: str, content: Any) -> None:
        """Writes anything that torch.save takes."""
        start = self._file.tell()
        buffer = io.BytesIO()
        torch.save(content, buffer)
        self._file.write(buffer.getbuffer())
        self._state[name] = BytesStorageMetadata()
        self._places[MetadataIndex(name)] = self._place(start)

    def write_chunk(
        self, name: str, value: torch.Tensor, layer: int | None = None, num_layers: int = 1
    ) -> None:
        """Writes a whole tensor, or the one of `layer` in a stack of `num_layers` such tensors."""
        start = self._file.tell()
        stack, at, one = ((), (), ()) if layer is None else ((num_layers,), (layer,), (1,))
        shape = torch.Size((*one, *value.shape))
        offsets = torch.Size((*at, *(0,) * value.dim()))
        spec = {"chunk": TensorSpec(value.dtype, shape)}
        with TorchWriter(self._file, spec, lambda tensors: tensors["chunk"]) as writer:
            writer.write("chunk", [value])
        full = TensorStorageMetadata(
            TensorProperties(dtype=value.dtype), torch.Size((*stack, *value.shape)), []
        )
        self._state.setdefault(name, full).chunks.append(ChunkStorageMetadata(offsets, shape))
        self._places[MetadataIndex(name, offsets)] = self._place(start)

    def write_index(self, path: Path) -> None:
        """Writes `.metadata`."""
        metadata = Metadata(self._state, storage_data=self._places, storage_meta=StorageMeta())
        path.write_bytes(pickle.dumps(metadata))

    def _place(self, start: int) -> _StorageInfo:
        return _StorageInfo(DATA_FILE, start, self._file.tell() - start)


def _arguments(
    settings: Settings, dtype: torch.dtype, args: Namespace | None, iteration: int | None
) -> Namespace:
    """What Megatron and this library look up in the arguments of a loaded checkpoint."""
    flags = settings.as_flags()
    result = Namespace(**vars(args)) if args is not None else Namespace()
    vars(result).update(
        {name: value for name, value in flags.items() if name != "tokenizer_fingerprint"},
        glm_settings=flags,
        tokenizer_fingerprint=settings.tokenizer_fingerprint,
        seq_length=settings.seq_length,
        max_position_embeddings=settings.seq_length,
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        # Weights have no layout, and no states come with them.
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        use_distributed_optimizer=False,
        dist_ckpt_optim_fully_reshardable=False,
        # Nobody looks for the states of a release; of an iteration somebody would.
        no_save_optim=iteration is not None,
        no_save_rng=iteration is not None,
    )
    if iteration is None or args is None:
        # Where the data of a run stands: at its beginning.
        result.consumed_train_samples = result.consumed_valid_samples = 0
        result.skipped_train_samples = 0
        result.mix_state, result.ledger_state = None, {}
    return result
