"""tools/verify_checkpoint.py: what it prints and what it answers."""

import warnings

import numpy as np
import pytest
import torch

from tests.checkpoint.building import (
    GOLDEN,
    GOLDEN_SAT,
    MemorySource,
    remote_code_in,
    write_hugging_face,
    write_megatron,
    write_sat,
)
from tests.ranks import run_ranks
from tools import convert_checkpoint, verify_checkpoint

CASES = str(GOLDEN / "cases.npz")


def status_of(*arguments) -> int:
    with pytest.raises(SystemExit) as status:
        verify_checkpoint.main([str(argument) for argument in arguments])
    return status.value.code


@pytest.mark.parametrize("tp", GOLDEN_SAT)
@pytest.mark.parametrize("angles", ["fp32", "fp16"])
def test_the_released_checkpoint_is_certified(tp, angles, capsys):
    status = status_of("--load", GOLDEN_SAT[tp], "--cases", CASES, "--rotary-angle-dtype", angles)
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert [line.split()[-1] for line in lines[2:9]] == ["equal"] * 7
    assert lines[-1] == "all cases are within 0.0001"


def test_wrong_angles_are_found(capsys):
    cases = ["--cases", CASES, "--rotary-angle-dtype", "fp32"]
    assert status_of("--load", GOLDEN_SAT[1], *cases, "--tolerance", "1e-7") == 1
    assert "DIFFERENT" in capsys.readouterr().out


@pytest.mark.parametrize("change", [0, 1])
def test_two_checkpoints_are_compared_on_packs_of_their_own(tmp_path, capsys, change):
    source = MemorySource(dtype=torch.float32)
    write_sat(tmp_path / "a", source)
    source.weights["decoder.layers.1.mlp.linear_fc2.bias"][3] += change
    write_hugging_face(tmp_path / "b", source)
    arguments = ["--load", tmp_path / "a", "--against", tmp_path / "b", "--reference",
                 "--rotary-angle-dtype", "fp32"]  # fmt: skip
    assert status_of(*arguments) == change
    assert ("NOT all cases" in capsys.readouterr().out) == bool(change)


def test_rounded_weights_are_named_where_types_differ(tmp_path, capsys):
    source = MemorySource(dtype=torch.float32)
    write_hugging_face(tmp_path / "a", source)
    source.weights = {name: weight.half() for name, weight in source.weights.items()}
    source.dtype = torch.float16
    write_hugging_face(tmp_path / "b", source)
    arguments = ["--load", tmp_path / "a", "--against", tmp_path / "b", "--reference"]
    assert status_of(*arguments, "--tolerance", "1e-9") == 1
    said = capsys.readouterr().out.splitlines()[-1]
    a, b = tmp_path / "a", tmp_path / "b"
    assert said.startswith(f"{a} holds torch.float32 and {b} torch.float16: ")


@pytest.fixture
def modules_folder(tmp_path):
    with remote_code_in(tmp_path / "modules"):
        yield


def test_hugging_face_code_is_run_only_if_it_is_ours(tmp_path, capsys, modules_folder):
    source = MemorySource(dtype=torch.float32)
    write_sat(tmp_path / "a", source)
    folder = write_hugging_face(tmp_path / "b", source)
    arguments = ["--load", folder, "--against", tmp_path / "a", "--rotary-angle-dtype", "fp32"]
    assert status_of(*arguments) == 0
    with open(folder / "modeling_megatron_glm.py", "a") as file:
        file.write(f"\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    assert status_of(*arguments) == 2
    assert "is not this repository's modelling code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert status_of(*arguments, "--reference") == 0
    assert status_of(*arguments, "--trust-remote-code") == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_export_is_what_it_was_converted_from(tmp_path, capsys, modules_folder, bits):
    pytest.importorskip("compressed_tensors")

    def convert(*arguments):
        convert_checkpoint.main([str(argument) for argument in arguments])

    # Two shards: more scales a row in half of the linears than in the others.
    convert("--from", "sat", "--to", "sat", "--load", GOLDEN_SAT[2], "--save", tmp_path / "sat",
            "--quantization-bit-width", bits)  # fmt: skip
    convert("--from", "sat", "--to", "hf", "--load", tmp_path / "sat", "--save", tmp_path / "hf")
    arguments = ["--load", tmp_path / "hf", "--against", tmp_path / "sat"]
    assert status_of(*arguments) == 0
    assert status_of(*arguments, "--reference") == 0

    shard = next(tmp_path.glob("sat/*/mp_rank_01_model_states.pt"))
    stored = torch.load(shard)
    stored["module"]["transformer.layers.3.mlp.dense_4h_to_h.weight"][3, 5] ^= 1
    torch.save(stored, shard)
    assert status_of(*arguments) == 1
    assert status_of(*arguments, "--reference") == 1


def verify_on_one_rank(*arguments) -> int:
    """Where a warning of Megatron's would be an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="megatron")
        return status_of(*arguments)


@pytest.mark.ranks
@pytest.mark.parametrize("angles", ["fp32", "fp16"])
def test_megatron_checkpoints_are_run_by_megatron(tmp_path, angles):
    from megatron_glm.checkpoint.sat import SATCheckpoint

    folder = write_megatron(tmp_path / "run", SATCheckpoint(GOLDEN_SAT[2]))
    arguments = ["--load", folder, "--cases", CASES, "--rotary-angle-dtype", angles]
    assert run_ranks(verify_on_one_rank, *arguments, world_size=1, initialize=False) == [0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--load", "/nowhere"], "/nowhere: holds none of"),
        (["--load", GOLDEN_SAT[1]], "nothing to compare with: give --against"),
        (["--load", GOLDEN_SAT[1], "--cases", "/nowhere.npz"], "--cases /nowhere.npz"),
        (["--load", GOLDEN_SAT[1], "--format", "hf"], "config.json: cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, capsys):
    assert status_of(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_tokens_outside_the_vocabulary_are_refused(tmp_path, capsys):
    arrays = dict(np.load(CASES))
    arrays["tokens"][2, 5] = 512
    np.savez(tmp_path / "cases.npz", **arrays)
    assert status_of("--load", GOLDEN_SAT[1], "--cases", tmp_path / "cases.npz") == 2
    assert "a token is outside the 512" in capsys.readouterr().err
