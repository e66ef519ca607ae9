"""Megatron's torch_dist checkpoints: read without ranks, written so that Megatron reads them."""

import io
import os
import pickle
import shutil
from argparse import Namespace

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.megatron import MegatronCheckpoint
from megatron_glm.checkpoint.megatron_writer import MegatronWriter
from megatron_glm.checkpoint.table import Dimensions, Format, tensors
from tests.checkpoint.building import (
    SMALL,
    MemorySource,
    assert_same_bits,
    read_all,
    write_megatron,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("iteration", [None, 40])
def test_what_is_written_is_read_back(tmp_path, dtype, iteration):
    source = MemorySource(dtype=dtype, tokenizer_fingerprint={"sha256": "1"})
    folder = write_megatron(tmp_path / "run", source, iteration)
    checkpoint = MegatronCheckpoint(folder)
    assert checkpoint.settings == source.settings
    assert checkpoint.iteration == (iteration or 0)
    assert_same_bits(read_all(checkpoint), source.weights)
    name = "release" if iteration is None else "iter_0000040"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [name, "latest_checkpointed_iteration.txt"]
    )


def test_the_files_are_those_of_torch_distributed_checkpoint(tmp_path):
    source = MemorySource()
    folder = write_megatron(tmp_path / "run", source) / "release"
    stored = {"decoder.layers.mlp.linear_fc1.weight": torch.empty(2, 256, 64).half()}
    dcp.load(stored, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for layer, weight in enumerate(stored["decoder.layers.mlp.linear_fc1.weight"]):
        expected = source.weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"]
        assert torch.equal(weight, expected)


def save_by_library(folder, source, split=1, rename=lambda name: name):
    """The same weights saved by torch.distributed.checkpoint, each in `split` row chunks."""
    writer = MegatronWriter(source.settings, source.dtype)
    state = {"common_state/shard_0_1": io.BytesIO()}
    torch.save([{"args": writer._args, "iteration": 3}], state["common_state/shard_0_1"])
    state |= {rename(name): weight for name, weight in source.weights.items()}
    target = folder / "iter_0000003"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(str(target)), no_dist=True,
             planner=BytesAsTheyAre())  # fmt: skip
    (folder / "latest_checkpointed_iteration.txt").write_text("3")


class BytesAsTheyAre(dcp.DefaultSavePlanner):
    def transform_object(self, write_item, object):
        return object if isinstance(object, io.BytesIO) else super().transform_object(
            write_item, object
        )


def test_layers_that_are_named_one_by_one_are_read(tmp_path):
    source = MemorySource()
    save_by_library(tmp_path, source)
    checkpoint = MegatronCheckpoint(tmp_path)
    assert checkpoint.iteration == 3
    assert_same_bits(read_all(checkpoint), source.weights)


def test_a_tensor_that_no_glm_has_is_named(tmp_path):
    source = MemorySource()
    source.weights["decoder.layers.0.mlp.router.weight"] = torch.ones(3).half()
    save_by_library(tmp_path, source)
    with pytest.raises(UnknownTensorError, match="decoder.layers.0.mlp.router.weight"):
        MegatronCheckpoint(tmp_path)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    source = MemorySource()
    del source.weights["decoder.layers.1.mlp.linear_fc2.bias"]
    save_by_library(tmp_path, source)
    with pytest.raises(MissingTensorError, match="decoder.layers.1.mlp.linear_fc2.bias"):
        MegatronCheckpoint(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    source = MemorySource()
    source.weights["decoder.final_layernorm.bias"] = torch.ones(63).half()
    save_by_library(tmp_path, source)
    with pytest.raises(ShapeError, match=r"decoder.final_layernorm.bias is \[63\].*\[64\]"):
        MegatronCheckpoint(tmp_path)


def test_weights_of_two_types_are_refused(tmp_path):
    source = MemorySource()
    source.weights["decoder.final_layernorm.bias"] = torch.ones(64)
    save_by_library(tmp_path, source)
    with pytest.raises(CorruptFileError, match="types.*float16.*float32"):
        MegatronCheckpoint(tmp_path)


def test_the_arguments_of_the_run_are_carried_on(tmp_path):
    source = MemorySource()
    args = Namespace(lr=3e-4, consumed_train_samples=320, hidden_size=1)
    for iteration, samples in ((9, 320), (None, 0)):
        folder = tmp_path / str(iteration)
        folder.mkdir()
        MegatronWriter(source.settings, source.dtype, iteration, args).write(folder, source.read)
        stored = MegatronCheckpoint(folder).args
        assert (stored.lr, stored.hidden_size) == (3e-4, 64)
        assert stored.consumed_train_samples == samples


@pytest.fixture
def run(tmp_path):
    return write_megatron(tmp_path / "run", MemorySource(), 40)


def test_another_iteration_can_be_named(run):
    shutil.copytree(run / "iter_0000040", run / "iter_0000020")
    assert MegatronCheckpoint(run, 20).iteration == 40
    with pytest.raises(CheckpointError, match="iter_0000030: no such folder"):
        MegatronCheckpoint(run, 30)


@pytest.mark.parametrize(
    "file, message",
    [
        ("latest_checkpointed_iteration.txt", "latest_checkpointed_iteration.txt: cannot be read"),
        ("iter_0000040/.metadata", "has no .metadata, so its save was not finished"),
        ("iter_0000040/__0_0.distcp", "__0_0.distcp: is missing"),
    ],
)
def test_a_missing_file_is_named(run, file, message):
    (run / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        MegatronCheckpoint(run)


def test_a_damaged_index_is_refused(run):
    path = run / "iter_0000040" / ".metadata"
    whole = path.read_bytes()
    for data in (b"", whole[: len(whole) // 2], b"garbage", pickle.dumps([1])):
        path.write_bytes(data)
        with pytest.raises(CorruptFileError, match=".metadata"):
            MegatronCheckpoint(run)


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_an_index_that_wants_to_run_code_is_refused_and_not_run(run, tmp_path):
    (run / "iter_0000040" / ".metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(CorruptFileError, match="mkdir.*could run code"):
        MegatronCheckpoint(run)
    assert not (tmp_path / "ran").exists()


def edit_index(run, change):
    path = run / "iter_0000040" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_an_index_that_points_outside_its_folder_is_refused(run):
    def point(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = "../../../etc/passwd"

    edit_index(run, point)
    with pytest.raises(CorruptFileError, match="outside its folder"):
        MegatronCheckpoint(run)


def test_a_chunk_that_is_not_there_is_found_when_it_is_read(run):
    def drop(metadata):
        index = next(i for i in metadata.storage_data if i.fqn.endswith("fc2.bias"))
        del metadata.storage_data[index]

    edit_index(run, drop)
    checkpoint = MegatronCheckpoint(run)
    with pytest.raises(MissingTensorError, match="0 of 64 elements of .*fc2.bias"):
        read_all(checkpoint)


def test_a_wrong_bit_is_found_when_it_is_read(run):
    path = run / "iter_0000040" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="__0_0.distcp"):
        read_all(MegatronCheckpoint(run))


def test_checkpoints_without_glm_settings_are_refused(run):
    source = MemorySource()
    writer = MegatronWriter(source.settings, source.dtype)
    del writer._args.glm_settings
    shutil.rmtree(run / "iter_0000040")
    writer.iteration = 40
    writer.write(run, source.read)
    with pytest.raises(CheckpointError, match="holds no GLM settings"):
        MegatronCheckpoint(run)


def test_sizes_and_settings_must_agree(run):
    source = MemorySource(Dimensions(2, 64, 128, 8, 128))
    writer = MegatronWriter(source.settings, source.dtype, 40)
    writer.settings = MemorySource().settings
    shutil.rmtree(run / "iter_0000040")
    writer.write(run, MemorySource().read)
    with pytest.raises(ShapeError, match=r"word_embeddings.weight is \[64, 64\].*\[128, 64\]"):
        MegatronCheckpoint(run)


def test_one_tensor_is_held_at_a_time(tmp_path):
    """The writer asks for each tensor once, layer by layer."""
    source, asked = MemorySource(), []

    def read(tensor):
        asked.append(tensor.name(Format.MEGATRON))
        return source.read(tensor)

    MegatronWriter(source.settings, source.dtype).write(tmp_path, read)
    assert asked == [tensor.name(Format.MEGATRON) for tensor in tensors(SMALL)]


def test_reading_leaves_megatron_able_to_load(tmp_path):
    """Megatron allows its own classes once, at its import; nothing may take them away again."""
    folder = write_megatron(tmp_path / "run", MemorySource())
    MegatronCheckpoint(folder)
    torch.save({"args": Namespace(rank=0)}, tmp_path / "args.pt")
    assert torch.load(tmp_path / "args.pt", weights_only=True)["args"].rank == 0
