"""Files written block by block are torch.save's to every reader."""

import zipfile

import pytest
import torch

from megatron_glm.checkpoint import torch_file
from megatron_glm.checkpoint.torch_writer import TensorSpec, TorchWriter

TENSORS = {
    "a": torch.randn(300, 50).half(),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randint(-9, 9, (4, 4), dtype=torch.int8),
    "d": torch.randn(2, 3, 4),
}
SPECS = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_torch_load_gives_the_tensors_back(tmp_path, options, monkeypatch):
    monkeypatch.setattr(torch_file, "BLOCK_BYTES", 999)
    path = tmp_path / "mp_rank_00_model_states.pt"
    with TorchWriter(path, SPECS) as file:
        for name, tensor in TENSORS.items():
            file.write(name, tensor.split(2))
    loaded = torch.load(path, weights_only=True, **options)["module"]
    assert list(loaded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert not options or loaded[name].data_ptr() % 64 == 0
    assert zipfile.ZipFile(path).testzip() is None
    assert torch_file.TorchFile(path).root == path.stem


def test_the_archive_is_what_zipfile_writes(tmp_path):
    with TorchWriter(tmp_path / "ours.pt", SPECS) as file:
        for name, tensor in TENSORS.items():
            file.write(name, [tensor])
    with (
        zipfile.ZipFile(tmp_path / "ours.pt") as ours,
        zipfile.ZipFile(tmp_path / "theirs.pt", "w") as theirs,
    ):
        for entry in ours.infolist():
            again = zipfile.ZipInfo(entry.filename)
            again.extra = entry.extra
            theirs.writestr(again, ours.read(entry))
    assert (tmp_path / "ours.pt").read_bytes() == (tmp_path / "theirs.pt").read_bytes()


def test_a_record_of_more_than_4_gb_is_found_again(tmp_path):
    # Sparse on disk: only its place in the archive matters.
    spec = TensorSpec(torch.int8, (2**32 + 10,))
    path = tmp_path / "big.pt"
    with TorchWriter(path, {"big": spec, "last": TensorSpec(torch.int8, (3,))}) as file:
        file._zip.fp = SparseFile(file._zip.fp)
        zeros = torch.zeros(2**28, dtype=torch.int8)
        file.write("big", [zeros] * 16 + [torch.ones(10, dtype=torch.int8)])
        file.write("last", [torch.tensor([1, 2, 3], dtype=torch.int8)])
    loaded = torch.load(path, mmap=True, weights_only=True)["module"]
    assert loaded["big"].shape == (2**32 + 10,)
    assert loaded["big"][-11:].tolist() == [0] + [1] * 10
    assert loaded["last"].tolist() == [1, 2, 3]


class SparseFile:
    """Skips over zeros instead of writing them."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        if len(data) >= 2**20:
            self._file.seek(len(data), 1)
            return len(data)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_tensors_in_another_order_or_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="b written where a is due"):
        with TorchWriter(tmp_path / "a.pt", SPECS) as file:
            file.write("b", [TENSORS["b"]])
    with pytest.raises(ValueError, match="a: 100 bytes written, 30000 announced"):
        with TorchWriter(tmp_path / "b.pt", SPECS) as file:
            file.write("a", [TENSORS["a"][:1]])
    with pytest.raises(ValueError, match="b was never written"):
        with TorchWriter(tmp_path / "c.pt", SPECS) as file:
            file.write("a", [TENSORS["a"]])


def test_a_file_that_was_given_up_cannot_be_loaded(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with TorchWriter(tmp_path / "a.pt", SPECS) as file:
            file.write("a", [TENSORS["a"]])
            raise KeyboardInterrupt
    with pytest.raises(RuntimeError):
        torch.load(tmp_path / "a.pt", weights_only=True)
