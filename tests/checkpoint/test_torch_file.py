"""Reading torch.save files by place: the bits of torch.load, and nothing else."""

import os

import pytest
import torch

from megatron_glm.checkpoint import torch_file
from megatron_glm.checkpoint.errors import CorruptFileError
from megatron_glm.checkpoint.torch_file import TorchFile


@pytest.fixture
def saved(tmp_path):
    content = {
        "a": torch.randn(300, 50).half(),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randint(-9, 9, (4, 4), dtype=torch.int8),
        "scalar": torch.tensor(3.0),
    }
    torch.save(content, tmp_path / "file.pt")
    return tmp_path / "file.pt", content


def test_tensors_are_those_that_were_saved(saved):
    path, content = saved
    file = TorchFile(path)
    assert file.root == "file"
    for name, expected in content.items():
        stored = file.stored(file.content[name])
        assert stored.crc32 is not None
        assert torch.equal(stored.read(), expected)


def test_a_file_inside_another_is_read_in_place(saved, tmp_path):
    path, content = saved
    inner = path.read_bytes()
    (tmp_path / "outer").write_bytes(b"x" * 1000 + inner + b"y" * 1000)
    file = TorchFile(tmp_path / "outer", 1000, len(inner))
    assert torch.equal(file.stored(file.content["a"]).read(), content["a"])


def test_columns_are_filled_block_by_block(saved, monkeypatch):
    monkeypatch.setattr(torch_file, "BLOCK_BYTES", 1024)
    path, content = saved
    file = TorchFile(path)
    whole = torch.zeros(300, 120, dtype=torch.float16)
    file.stored(file.content["a"]).read_into([whole[:200, 30:80], whole[200:, 30:80]])
    assert torch.equal(whole[:, 30:80], content["a"])
    assert whole[:, :30].count_nonzero() == whole[:, 80:].count_nonzero() == 0


def test_several_tensors_in_one_storage_are_read_by_their_own_place(tmp_path):
    base = torch.arange(100.0)
    torch.save([base[:40], base[40:]], tmp_path / "shared.pt")
    file = TorchFile(tmp_path / "shared.pt")
    assert torch.equal(file.stored(file.content[1]).read(), base[40:])


def test_a_strided_view_is_refused(tmp_path):
    torch.save(torch.randn(4, 6).T, tmp_path / "view.pt")
    file = TorchFile(tmp_path / "view.pt")
    with pytest.raises(CorruptFileError, match="strided view"):
        file.stored(file.content)


def test_one_wrong_bit_is_found(saved):
    path, content = saved
    file = TorchFile(path)
    stored = file.stored(file.content["a"])
    data = bytearray(path.read_bytes())
    data[stored.offset + 77] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="checksum"):
        TorchFile(path).stored(file.content["a"]).read()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused_by_name(saved, share):
    path, _ = saved
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CorruptFileError, match="file.pt"):
        TorchFile(path)


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_wants_to_run_code_is_refused_and_not_run(tmp_path):
    torch.save({"module": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CorruptFileError, match="evil.pt.*run code.*mkdir"):
        TorchFile(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_the_old_format_of_torch_save_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptFileError, match="old.pt"):
        TorchFile(tmp_path / "old.pt")
