"""safetensors files against the library that defines them."""

import json
import os

import pytest
import safetensors.torch
import torch

from megatron_glm.checkpoint.errors import CorruptFileError
from megatron_glm.checkpoint.safetensors_file import SafetensorsWriter, read_index
from megatron_glm.checkpoint.torch_writer import TensorSpec

TENSORS = {
    "a": torch.randn(30, 5).half(),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randint(-9, 9, (4, 4), dtype=torch.int32),
    "d": torch.tensor([1, 2]),
}


def write(path, tensors=TENSORS):
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with SafetensorsWriter(path, specs) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor.split(3))


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "a.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.torch.save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    index = read_index(tmp_path / "a.safetensors")
    assert index.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(index[name].read(), tensor)


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"

    def refused():
        with pytest.raises(CorruptFileError, match="a.safetensors: not a whole"):
            read_index(path)

    for size in (0, 4, 100, -1):
        write(path)
        os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
        refused()
    for header in (
        [], {"a": 1}, {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 5]}},
        {"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F16", "shape": [-2], "data_offsets": [-4, 0]}},
    ):  # fmt: skip
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
        refused()
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refused()


def test_tensors_in_another_order_or_size_are_refused(tmp_path):
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    with pytest.raises(ValueError, match="b written where a is due"):
        with SafetensorsWriter(tmp_path / "a", specs) as file:
            file.write("b", [torch.ones(2)])
    with pytest.raises(ValueError, match="12 bytes written, 8 announced"):
        with SafetensorsWriter(tmp_path / "a", specs) as file:
            file.write("a", [torch.ones(3)])
    with pytest.raises(ValueError, match="b was never written"):
        with SafetensorsWriter(tmp_path / "a", specs) as file:
            file.write("a", [torch.ones(2)])
