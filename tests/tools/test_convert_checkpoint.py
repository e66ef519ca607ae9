"""tools/convert_checkpoint.py: the whole way, its memory, and what a kill or a full disk leaves."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_glm.checkpoint import torch_writer
from megatron_glm.checkpoint.formats import open_checkpoint
from megatron_glm.checkpoint.hugging_face_writer import GroupedQuantization, HuggingFaceWriter
from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.checkpoint.sat import SATCheckpoint
from megatron_glm.checkpoint.sat_writer import SATWriter
from megatron_glm.checkpoint.table import Dimensions, Tensor
from tests.checkpoint.building import (
    GOLDEN_SAT,
    MemorySource,
    assert_same_bits,
    read_all,
    write_hugging_face,
    write_megatron,
    write_sat,
)
from tests.data.codecs.models import bpe
from tools import convert_checkpoint

ROOT = Path(__file__).parents[2]
WRITERS = {"sat": write_sat, "megatron": write_megatron, "hf": write_hugging_face}


def convert(source: str, target: str, load, save, *more) -> None:
    convert_checkpoint.main(
        ["--from", source, "--to", target, "--load", str(load), "--save", str(save),
         *map(str, more)]
    )  # fmt: skip


def error_of(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as status:
        convert(*arguments)
    assert status.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("target", WRITERS)
@pytest.mark.parametrize("source", WRITERS)
def test_every_format_goes_to_every_other_without_loss(tmp_path, source, target, capsys):
    made = MemorySource()
    load = WRITERS[source](tmp_path / "a", made)
    convert(source, target, load, tmp_path / "b")
    found = open_checkpoint(tmp_path / "b")
    assert_same_bits(read_all(found), made.weights)
    record = json.loads((tmp_path / "b" / "conversion.json").read_text())
    assert record["source"]["format"] == source and record["target"]["format"] == target
    assert all(entry["source"] == entry["target"] for entry in record["tensors"].values())
    assert len(record["tensors"]) == len(made.weights)
    # Settings survive SAT, which has no place for them, beside it.
    if source != "sat":
        assert found.settings == made.settings
    assert f"{tmp_path / 'b'}: whole" in capsys.readouterr().out


@pytest.mark.parametrize("tp", GOLDEN_SAT)
@pytest.mark.parametrize("through", ["megatron", "hf"])
def test_the_released_files_survive_a_round_trip(tmp_path, tp, through):
    convert("sat", through, GOLDEN_SAT[tp], tmp_path / "a")
    convert(through, "sat", tmp_path / "a", tmp_path / "b", "--target-tp", tp, "--iteration", 1)
    for rank in range(tp):
        name = f"1/mp_rank_{rank:02d}_model_states.pt"
        ours = torch.load(tmp_path / "b" / name, weights_only=True)["module"]
        theirs = torch.load(GOLDEN_SAT[tp] / name, weights_only=True)["module"]
        assert list(ours) == list(theirs)
        assert_same_bits(ours, theirs)


def test_flags_complete_the_settings_that_a_format_lacks(tmp_path):
    bpe(vocab_size=290).save(str(tmp_path / "tokenizer.json"))
    load = write_sat(tmp_path / "a", MemorySource(Dimensions(1, 64, 128, 8, 320)))
    convert("sat", "hf", load, tmp_path / "b", "--rotary-angle-dtype", "fp32",
            "--no-unified-multitask-encoding", "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", tmp_path / "tokenizer.json")  # fmt: skip
    settings = open_checkpoint(tmp_path / "b").settings
    assert settings.rotary_angle_dtype == "fp32"
    assert not settings.unified_multitask_encoding
    assert settings.tokenizer_fingerprint["type"] == "HuggingFaceTokenizer"
    convert("hf", "megatron", tmp_path / "b", tmp_path / "c")
    assert open_checkpoint(tmp_path / "c").settings == settings


def test_an_export_hands_its_tokenizer_on(tmp_path, capsys):
    bpe(vocab_size=290).save(str(tmp_path / "tokenizer.json"))
    load = write_sat(tmp_path / "a", MemorySource(Dimensions(1, 64, 128, 8, 320)))
    convert("sat", "hf", load, tmp_path / "b", "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", tmp_path / "tokenizer.json")  # fmt: skip
    code = tmp_path / "b" / "tokenization_megatron_glm.py"
    written = code.read_text()
    code.write_text("raise SystemExit  # somebody else's")
    convert("hf", "hf", tmp_path / "b", tmp_path / "c", "--quantization-bit-width", "8")
    for name in ("glm_text.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "c" / code.name).read_text() == written
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in "bc")
    assert after.pop("quantization_config") and after == before
    assert "no tokenizer" not in capsys.readouterr().err


def test_another_tokenizer_than_that_of_the_run_is_refused(tmp_path, capsys):
    bpe(vocab_size=290).save(str(tmp_path / "tokenizer.json"))
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer",
                 "--tokenizer-model", tmp_path / "tokenizer.json"]  # fmt: skip
    known = MemorySource(Dimensions(1, 64, 128, 8, 320), tokenizer_fingerprint={"sha256": "1"})
    load = write_megatron(tmp_path / "a", known)
    message = error_of(capsys, "megatron", "hf", load, tmp_path / "b", *tokenizer)
    assert "--tokenizer-model" in message and "{'sha256': '1'} there" in message
    assert message.endswith("give that file and its type")
    load = write_megatron(tmp_path / "c", MemorySource())
    message = error_of(capsys, "megatron", "hf", load, tmp_path / "b", *tokenizer)
    assert "more than the 64 of" in message
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target-tp", "3"], "tensor parallel size 3"),
        (["--load", "/nowhere"], "/nowhere/latest: cannot be read"),
        (["--save", "/proc/here"], "/proc/here: cannot be written"),
        (["--quantization-group-size", "8"], "only Hugging Face"),
        (["--tokenizer-type", "IceTokenizer"], "--tokenizer-model None: give both or neither"),
        (["--tokenizer-model", "a.json"], "--tokenizer-type None --tokenizer-model a.json: give"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, arguments, message, capsys):
    load = GOLDEN_SAT[1]
    assert message in error_of(capsys, "sat", "sat", load, tmp_path / "b", *arguments)
    assert not (tmp_path / "b").exists()


def test_groups_of_weights_that_are_not_quantised_are_refused(tmp_path, capsys):
    load = write_megatron(tmp_path / "a", MemorySource())
    groups = ["--quantization-group-size", "8"]
    message = error_of(capsys, "megatron", "hf", load, tmp_path / "b", *groups)
    assert "--quantization-group-size 8: nothing is quantised" in message


def test_what_is_there_is_not_overwritten_unasked(tmp_path, capsys):
    save = tmp_path / "b"
    convert("sat", "sat", write_sat(tmp_path / "a", MemorySource()), save)
    assert "--overwrite" in error_of(capsys, "sat", "sat", GOLDEN_SAT[1], save)
    assert SATCheckpoint(save).dimensions.num_layers == 2
    convert("sat", "sat", GOLDEN_SAT[1], save, "--overwrite")
    assert SATCheckpoint(save).dimensions.num_layers == 4


def test_only_a_conversion_is_overwritten(tmp_path, capsys):
    trained = write_megatron(tmp_path / "trained", MemorySource(), iteration=5)
    converted = tmp_path / "converted"
    for _ in range(2):
        # The second time over the first.
        convert("sat", "megatron", GOLDEN_SAT[1], converted, "--iteration", "3", "--overwrite")
    # As training on in the folder would do.
    shutil.copytree(trained / "iter_0000005", converted / "iter_0000005")
    for save in (trained, converted):
        message = error_of(capsys, "sat", "sat", GOLDEN_SAT[1], save, "--overwrite")
        assert f"--save {save}: holds more than a conversion wrote" in message
        assert (save / "iter_0000005" / "metadata.json").is_file()


def test_a_source_is_not_replaced_by_its_conversion(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    load = write_sat(tmp_path / "runs" / "a", MemorySource())
    before = (load / "latest").read_bytes()
    link = tmp_path / "link"
    link.symlink_to(load)
    for save in (load, load.parent, link):
        message = error_of(capsys, "sat", "hf", load, save, "--overwrite")
        assert f"--save {save}: holds --load {load}" in message
    assert (load / "latest").read_bytes() == before
    convert("sat", "hf", load, load / "hf")


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    write, written = torch_writer.TorchWriter.write, []

    def fill_up(self, name, pieces):
        written.append(name)
        if len(written) == 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, pieces)

    monkeypatch.setattr(torch_writer.TorchWriter, "write", fill_up)
    message = error_of(capsys, "sat", "sat", GOLDEN_SAT[1], tmp_path / "b")
    assert re.search(r"--save .*b: the disk is full; 0.\d+ GB are needed in all", message)
    assert not list(tmp_path.iterdir())


class LargeSource(MemorySource):
    """0.4 GB of fp16 weights that take no time to make."""

    def __init__(self):
        super().__init__()
        dimensions = Dimensions(16, 1024, 2816, 16, 4096)
        self.settings = self.settings.with_overrides(dimensions=dimensions)
        self.pattern = torch.randn(1 << 20).half()

    def read(self, tensor: Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        shape = tensor.shape(self.settings.dimensions)
        count = torch.Size(shape).numel()
        repeated = self.pattern.repeat(-(-count // len(self.pattern)))
        return repeated[:count].view(shape).roll(tensor.layer or 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    folder, source = tmp_path_factory.mktemp("large"), LargeSource()
    SATWriter(source.settings, 4, source.dtype, None).write(folder, 1, source.read)
    return folder


def command(target: str, load: Path, save: Path, *more: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "tools/convert_checkpoint.py", "--from", "sat",
            "--to", target, "--load", str(load), "--save", str(save), *more]  # fmt: skip


@pytest.mark.parametrize(
    "target, more",
    [("sat", ["--target-tp", "2"]), ("hf", ["--quantization-bit-width", "4"]), ("megatron", []),
     ("hf", ["--dtype", "fp32"])],
)  # fmt: skip
def test_the_announced_memory_is_kept_by_a_checkpoint_that_is_larger(large, tmp_path, target, more):
    result = subprocess.run(
        command(target, large, tmp_path / "b", *more), capture_output=True, text=True, cwd=ROOT,
        timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    announced, largest = map(
        float, re.search(r"at most ([\d.]+) GB, of which ([\d.]+) GB", result.stdout).groups()
    )
    read = float(re.search(r"([\d.]+) GB to read", result.stdout)[1])
    measured = float(re.findall(r"peak memory: ([\d.]+) GB", result.stdout)[-1])
    assert measured <= announced
    # All of it together would not have fitted into what was announced for weights and buffers.
    assert read > 1.3 * (largest + convert_checkpoint.WORKING_BYTES / 1e9)


class WideQuantizedSource(MemorySource):
    """INT4 weights of one layer, whose largest takes 0.13 GB a byte an element."""

    def __init__(self):
        super().__init__()
        dimensions = Dimensions(1, 1024, 65536, 16, 64)
        self.settings = self.settings.with_overrides(dimensions=dimensions)

    def read(self, tensor: Tensor, memory: torch.Tensor | None = None):
        shape = tensor.shape(self.settings.dimensions)
        if not tensor.row.quantizable:
            return torch.zeros(shape, dtype=torch.float16)
        scales = torch.ones(shape[0], 1, dtype=torch.float16)
        return QuantizedWeight(torch.ones(shape, dtype=torch.int8), scales, 4)


@pytest.mark.parametrize("fmt", ["sat", "hf"])
def test_the_announced_memory_is_kept_by_packed_weights(tmp_path, fmt):
    source = WideQuantizedSource()
    (tmp_path / "a").mkdir()
    if fmt == "sat":
        writer = SATWriter(source.settings, 1, source.dtype, 4)
        writer.write(tmp_path / "a", 1, source.read)
    else:
        quantization = GroupedQuantization.uniform(4, None)
        writer = HuggingFaceWriter(source.settings, source.dtype, quantization)
        writer.write(tmp_path / "a", source.read)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/convert_checkpoint.py", "--from", fmt, "--to", fmt,
         "--load", str(tmp_path / "a"), "--save", str(tmp_path / "b")],
        capture_output=True, text=True, cwd=ROOT, timeout=250,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    announced = float(re.search(r"at most ([\d.]+) GB", result.stdout)[1])
    assert float(re.findall(r"peak memory: ([\d.]+) GB", result.stdout)[-1]) <= announced


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
def test_kill_minus_nine_leaves_the_old_or_the_new(large, tmp_path, delay):
    save = tmp_path / "b"
    convert("sat", "sat", write_sat(tmp_path / "a", MemorySource(seed=1)), save)
    process = subprocess.Popen(
        command("sat", large, save, "--overwrite", "--target-tp", "2"), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    partial = tmp_path / "b.partial"
    while not partial.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = SATCheckpoint(save)
    if found.dimensions.num_layers == 2:
        assert_same_bits(read_all(found), MemorySource(seed=1).weights)
    else:
        assert found.dimensions == LargeSource().settings.dimensions
    convert("sat", "sat", GOLDEN_SAT[1], save, "--overwrite")
    assert SATCheckpoint(save).dimensions.num_layers == 4
    assert not partial.exists()
