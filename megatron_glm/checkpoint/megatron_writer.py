"""Writes Megatron torch_dist checkpoints that `pretrain_glm.py --load` opens at any layout."""

import io
import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_glm.checkpoint.megatron import COMMON_STATE, TRACKER
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, Tensor, tensors

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
        # Nothing is copied ahead: one tensor in memory at a time, on machines with GPUs too.
        writer = dcp.FileSystemWriter(str(target), thread_count=1, per_thread_copy_ahead=0)
        planner = _StreamingPlanner(self.settings, self.dtype, common, read)
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            # What went wrong on the only rank there is, instead of a report on all ranks.
            cause, _ = error.failures[0]
            raise cause from None
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (target / "metadata.json").write_text(json.dumps(backend))
        (folder / TRACKER).write_text("release" if released else str(self.iteration))


class _StreamingPlanner(SavePlanner):
    """Hands tensors to the writer when it asks for them, one after another."""

    def __init__(
        self,
        settings: Settings,
        dtype: torch.dtype,
        common: dict[str, Any],
        read: Callable[[Tensor], torch.Tensor],
    ):
        self._dimensions, self._dtype, self._read = settings.dimensions, dtype, read
        self._objects = {COMMON_STATE: [common]}
        layers = self._dimensions.num_layers
        for linear in _LINEARS:
            for layer in range(layers):
                self._objects[f"decoder.layers.{linear}._extra_state/shard_{layer}_{layers}"] = [
                    None
                ]
        self._tensors: dict[tuple[str, int], Tensor] = {}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        """Nothing to take over: the tensors come from `read`."""

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan([*items, *map(self._item, tensors(self._dimensions))])

    def _item(self, tensor: Tensor) -> WriteItem:
        sizes = tensor.shape(self._dimensions)
        offsets, full = (0,) * len(sizes), sizes
        name = tensor.name(Format.MEGATRON)
        if tensor.layer is not None:
            name = tensor.row.megatron.replace("layers.{}.", "layers.")
            offsets, sizes = (tensor.layer, *offsets), (1, *sizes)
            full = (self._dimensions.num_layers, *full)
        self._tensors[name, tensor.layer or 0] = tensor
        return WriteItem(
            MetadataIndex(name, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                TensorProperties(dtype=self._dtype),
                torch.Size(full),
            ),
        )

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type is WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save(self._objects[index.fqn], buffer)
            buffer.seek(0)
            return buffer
        layer = index.offset[0] if index.fqn.startswith("decoder.layers.") else 0
        tensor = self._tensors[index.fqn, layer]
        value = self._read(tensor)
        return value if tensor.layer is None else value.unsqueeze(0)


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
        no_save_optim=True,
        no_save_rng=True,
    )
    if iteration is None or args is None:
        # Where the data of a run stands: at its beginning.
        result.consumed_train_samples = result.consumed_valid_samples = 0
        result.skipped_train_samples = 0
        result.mix_state, result.ledger_state = None, {}
    return result
