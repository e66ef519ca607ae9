"""What happens to a tensor on its way: type, codes, hashes, memory."""

import copy
import hashlib
import json
import time

import pytest
import torch

from megatron_glm.checkpoint import convert
from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.errors import CheckpointError, CorruptFileError
from megatron_glm.checkpoint.quantization import quantize
from megatron_glm.checkpoint.record import digest, read_record, recorded_settings, write_record
from megatron_glm.checkpoint.sat import SATCheckpoint
from megatron_glm.checkpoint.table import Format, tensors
from tests.checkpoint.building import SMALL, MemorySource, read_all, write_sat


def run(source, **options) -> tuple[dict, dict]:
    """The converted tensors and their hashes."""
    conversion = Conversion(source, **options)
    # What a call returns is good until the next one.
    converted = {t.name(Format.MEGATRON): copy.deepcopy(conversion(t)) for t in tensors(SMALL)}
    conversion.finish()
    return converted, conversion.hashes


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("before", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("after", [torch.float32, torch.float16, torch.bfloat16])
def test_types_are_cast_as_torch_does_block_by_block(before, after, monkeypatch):
    monkeypatch.setattr(convert, "BLOCK_BYTES", 4 * 777)
    source = MemorySource(dtype=before)
    converted, hashes = run(source, dtype=after)
    for name, weight in source.weights.items():
        assert converted[name].dtype == after
        assert torch.equal(converted[name], weight.to(after))
        expected = {"source": sha256(weight), "target": sha256(weight.to(after))}
        assert hashes[name] == expected


def test_a_weight_that_the_type_cannot_hold_is_named():
    source = MemorySource(dtype=torch.float32)
    source.weights["decoder.layers.1.mlp.linear_fc2.bias"][3] = -7e4
    with pytest.raises(CheckpointError, match="layers.1.mlp.linear_fc2.bias: holds 70000.*--dtype"):
        run(source, dtype=torch.float16)


def test_linear_weights_alone_are_quantised():
    source = MemorySource()
    scales = {t.row.megatron: 4 for t in tensors(SMALL) if t.row.quantizable}
    converted, hashes = run(source, dtype=torch.float16, bits=4, scales=scales)
    for tensor in tensors(SMALL):
        name = tensor.name(Format.MEGATRON)
        weight, value = source.weights[name], converted[name]
        if tensor.row.quantizable:
            expected = quantize(weight, 4, 4)
            assert torch.equal(value.codes, expected.codes)
            assert torch.equal(value.scales, expected.scales)
            both = expected.codes.numpy().tobytes() + expected.scales.numpy().tobytes()
            assert hashes[name]["target"] == hashlib.sha256(both).hexdigest()
        else:
            assert torch.equal(value, weight)


def test_nan_cannot_be_quantised():
    source = MemorySource()
    source.weights["decoder.layers.0.mlp.linear_fc2.weight"][1, 2] = float("nan")
    scales = {t.row.megatron: 1 for t in tensors(SMALL)}
    with pytest.raises(CheckpointError, match="layers.0.mlp.linear_fc2.weight: holds NaN"):
        run(source, dtype=torch.float16, bits=8, scales=scales)


@pytest.mark.parametrize(
    "before, options, factor",
    [
        (torch.float16, {"dtype": torch.float16}, 2),
        (torch.float32, {"dtype": torch.float16}, 4),
        (torch.float16, {"dtype": torch.float32}, 6),
        (torch.float16, {"dtype": torch.float16, "bits": 8}, 3),
    ],
)
def test_the_announced_memory_is_that_of_the_two_largest_tensors(before, options, factor):
    conversion = Conversion(MemorySource(dtype=before), **options)
    # linear_fc1 and linear_qkv, of which one is hashed while the other is read.
    assert conversion.peak_bytes() == (256 + 192) * 64 * factor


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"bits": 8}])
def test_no_tensor_is_hashed_after_another_took_its_memory(options, monkeypatch):
    source = MemorySource()
    options = {"dtype": torch.float16} | options
    if "bits" in options:
        options["scales"] = {t.row.megatron: 1 for t in tensors(SMALL)}
    expected = run(source, **options)[1]
    monkeypatch.setattr(convert, "digest", lambda value: time.sleep(0.01) or digest(value))
    assert run(source, **options)[1] == expected
    for name, weight in source.weights.items():
        assert expected[name]["source"] == sha256(weight)


def test_what_is_read_ahead_leaves_the_tensor_in_hand_alone():
    source = MemorySource()
    conversion = Conversion(source, torch.float16)
    for tensor in tensors(SMALL):
        value = conversion(tensor)
        time.sleep(0.005)
        assert torch.equal(value, source.weights[tensor.name(Format.MEGATRON)])
    conversion.finish()


def test_tensors_are_asked_for_in_the_order_of_the_table():
    conversion = Conversion(MemorySource(), torch.float16)
    first, second, *_ = tensors(SMALL)
    conversion(first)
    conversion(second)
    with pytest.raises(ValueError, match="asked for where"):
        conversion(second)


def test_hashes_of_an_earlier_conversion_are_checked(tmp_path):
    source = MemorySource()
    _, hashes = run(source, dtype=torch.float16)
    folder = write_sat(tmp_path / "sat", source, 2)
    described = {"format": "sat", "iteration": 7}
    write_record(folder, described, described, source.settings, hashes)
    checkpoint = SATCheckpoint(folder)
    assert checkpoint.settings == source.settings  # not those of the released model
    assert run(checkpoint, dtype=torch.float16)[1] == hashes

    hashes["decoder.final_layernorm.bias"]["target"] = "0" * 64
    write_record(folder, described, described, source.settings, hashes)
    with pytest.raises(CorruptFileError, match="final_layernorm.bias is not what conversion.json"):
        run(SATCheckpoint(folder), dtype=torch.float16)
    # A run that went on from it has other weights and another iteration.
    write_record(folder, described, described | {"iteration": 6}, source.settings, hashes)
    run(SATCheckpoint(folder), dtype=torch.float16)


def test_the_record_names_versions_and_settings(tmp_path):
    source = MemorySource(tokenizer_fingerprint={"sha256": "0", "vocab_size": 60})
    write_record(tmp_path, {"format": "sat"}, {"format": "hf"}, source.settings, {})
    record = read_record(tmp_path)
    assert record["settings"]["tokenizer_fingerprint"] == {"sha256": "0", "vocab_size": 60}
    assert record["settings"]["rotary_angle_dtype"] == "fp32"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert recorded_settings(tmp_path) == source.settings


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target": 1, "settings": {}, "tensors": {}}'])
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / "conversion.json").write_text(text)
    with pytest.raises(CorruptFileError, match="conversion.json: damaged"):
        read_record(tmp_path)


def test_a_record_of_another_model_is_refused(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource())
    settings = MemorySource().settings
    flags = settings.as_flags() | {"num_layers": 9, "seq_length": 64}
    record = {"target": {}, "settings": flags, "tensors": {}}
    (folder / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="conversion.json is of a model of other sizes"):
        SATCheckpoint(folder)


def test_progress_counts_every_byte():
    seen = []
    source = MemorySource()
    run(source, dtype=torch.float16, progress=seen.append)
    assert sum(seen) == sum(2 * value.numel() for value in read_all(source).values())
