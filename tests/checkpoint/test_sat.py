"""SAT checkpoints: the released tool's files in and out, at any split, plain and quantised."""

import shutil

import pytest
import torch

from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.sat import SATCheckpoint, file_name, load_full_state_dict
from megatron_glm.checkpoint.sat_writer import SATWriter
from megatron_glm.checkpoint.table import Format
from tests.checkpoint.building import (
    GOLDEN_SAT,
    SMALL,
    MemorySource,
    assert_same_bits,
    plan,
    read_all,
    write_sat,
)

LINEARS = (
    "attention.query_key_value.weight", "attention.dense.weight",
    "mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight",
)  # fmt: skip


def load_shard(folder, rank, iteration="7"):
    return torch.load(folder / iteration / file_name(rank), weights_only=True)["module"]


def edit_shard(folder, rank, change, iteration="7"):
    module = load_shard(folder, rank, iteration)
    change(module)
    torch.save({"module": module}, folder / iteration / file_name(rank))


@pytest.mark.parametrize("source_tp", GOLDEN_SAT)
@pytest.mark.parametrize("target_tp", GOLDEN_SAT)
def test_files_of_the_released_tool_come_out_bit_for_bit(tmp_path, source_tp, target_tp):
    source = SATCheckpoint(GOLDEN_SAT[source_tp])
    SATWriter(source.settings, target_tp, source.dtype, None).write(tmp_path, 1, source.read)
    assert (tmp_path / "latest").read_bytes() == b"1"
    for rank in range(target_tp):
        ours = load_shard(tmp_path, rank, "1")
        theirs = load_shard(GOLDEN_SAT[target_tp], rank, "1")
        assert list(ours) == list(theirs)
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_any_split_is_read_back(tmp_path, tp):
    source = MemorySource()
    checkpoint = SATCheckpoint(write_sat(tmp_path / "sat", source, tp))
    assert (checkpoint.tp_size, checkpoint.iteration) == (tp, 7)
    assert checkpoint.dimensions == SMALL
    assert_same_bits(read_all(checkpoint), source.weights)


def test_settings_are_those_of_the_released_model():
    settings = SATCheckpoint(GOLDEN_SAT[2]).settings
    assert settings.rotary_angle_dtype == "fp16"
    assert settings.unified_multitask_encoding


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tp", [1, 4])
def test_quantised_shards_are_what_the_released_tool_makes_of_each_shard(tmp_path, bits, tp):
    source = MemorySource()
    plain = write_sat(tmp_path / "plain", source, tp)
    target = plan(source, Format.SAT, target_tp=tp, quantization_bit_width=bits)
    (tmp_path / "q").mkdir()
    target.write(tmp_path / "q", Conversion(source, target.dtype, target.bits, target.scales))
    for rank in range(tp):
        before, after = load_shard(plain, rank), load_shard(tmp_path / "q", rank)
        for name, weight in before.items():
            if not name.endswith(LINEARS):
                assert torch.equal(after[name], weight)
                continue
            scale = (weight.abs().max(dim=-1).values / (2 ** (bits - 1) - 1)).half()
            codes = torch.round(weight / scale[:, None]).to(torch.int8)
            if bits == 4:
                codes = (codes[:, ::2] << 4) | (codes[:, 1::2] & 15)
            assert torch.equal(after[f"{name}_scale"], scale)
            assert torch.equal(after[name], codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_quantised_shards_come_out_bit_for_bit_at_their_own_split(tmp_path, bits, tp):
    source = MemorySource()
    for name in ("a", "b"):
        target = plan(source, Format.SAT, target_tp=tp, quantization_bit_width=bits)
        (tmp_path / name).mkdir()
        read = Conversion(source, target.dtype, target.bits, target.scales)
        target.write(tmp_path / name, read)
        source = SATCheckpoint(tmp_path / name)
        assert source.bits == bits
        if name == "a":
            with pytest.raises(CheckpointError, match="cannot be merged or split"):
                plan(source, Format.SAT, target_tp=3 - tp)
    for rank in range(tp):
        assert_same_bits(load_shard(tmp_path / "a", rank), load_shard(tmp_path / "b", rank))
    whole, dequantised = MemorySource().weights, load_full_state_dict(tmp_path / "a")
    for name, weight in whole.items():
        assert (dequantised[name] - weight).abs().max() < {8: 0.02, 4: 0.2}[bits]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_faster_transformer_finds_what_it_cuts_out(tmp_path, bits):
    """FasterTransformer-GLM's rules: the first half of h_to_4h is not gated and the second is, q, k
    and v of a head lie together, scales likewise; everything fp16 or int8."""
    source, tp = MemorySource(), 2
    target = plan(source, Format.SAT, target_tp=tp, quantization_bit_width=bits)
    target.write(tmp_path, Conversion(source, target.dtype, target.bits, target.scales))
    tolerance = {None: 0, 8: 0.02, 4: 0.2}[bits]

    def weight(module, name, rows=slice(None)):
        stored = module[f"transformer.layers.1.{name}"]
        if bits is None:
            return stored[rows]
        if bits == 4:
            stored = torch.stack((stored >> 4, stored << 4 >> 4), -1).flatten(1)
        return stored[rows] * module[f"transformer.layers.1.{name}_scale"][rows, None]

    def close(ours, theirs):
        assert (ours - theirs).abs().max() <= tolerance

    gated, plain = source.weights["decoder.layers.1.mlp.linear_fc1.weight"].chunk(2)
    qkv = source.weights["decoder.layers.1.self_attention.linear_qkv.weight"].view(8, 3, 8, 64)
    for rank in range(tp):
        module = load_shard(tmp_path, rank)
        assert {value.dtype for value in module.values()} <= {torch.float16, torch.int8}
        local = module["transformer.layers.0.mlp.dense_h_to_4h.weight"].shape[0] // 2
        close(weight(module, LINEARS[2], slice(local)), plain.chunk(tp)[rank])
        close(weight(module, LINEARS[2], slice(local, None)), gated.chunk(tp)[rank])
        cut = weight(module, LINEARS[0]).view(4, 3, 8, 64).transpose(0, 1)
        close(cut, qkv.transpose(0, 1)[:, 4 * rank : 4 * rank + 4])


def test_missing_shards_and_folders_are_named(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource(), 4)
    (folder / "7" / file_name(2)).unlink()
    with pytest.raises(CheckpointError, match="mp_rank_02_model_states.pt is missing"):
        SATCheckpoint(folder)
    # Nothing but shapes tells that the last one was there.
    (folder / "7" / file_name(3)).unlink()
    with pytest.raises(CheckpointError, match="mp_rank_02_model_states.pt is missing: .* one of 4"):
        SATCheckpoint(folder)
    shutil.rmtree(folder / "7")
    with pytest.raises(CheckpointError, match="7: holds no mp_rank"):
        SATCheckpoint(folder)
    (folder / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="latest: holds '../../etc'"):
        SATCheckpoint(folder)
    (folder / "latest").unlink()
    with pytest.raises(CheckpointError, match="latest: cannot be read"):
        SATCheckpoint(folder)


def test_a_newline_in_latest_is_borne(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource())
    (folder / "latest").write_text("7\n")
    assert SATCheckpoint(folder).iteration == 7


NAME = "transformer.layers.1.mlp.dense_4h_to_h.weight"
BIAS = "transformer.layers.1.mlp.dense_4h_to_h.bias"


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda m: m.pop(NAME), MissingTensorError, f"mp_rank_01.*lacks {NAME}"),
        (lambda m: m.update({NAME: m[NAME][:-1]}), ShapeError, NAME),
        (lambda m: m.update({NAME: m[NAME].float()}), ShapeError, f"{NAME} is torch.float32"),
        (lambda m: m.update({"transformer.x": m[BIAS]}), UnknownTensorError, "transformer.x"),
        (lambda m: m.update({BIAS: m[BIAS] + 1}), CheckpointError, "bias: differs between"),
        (lambda m: m.update({7: m[BIAS]}), CorruptFileError, "name: tensor"),
        (
            lambda m: m.update(
                {k: v * 2 for k, v in m.items() if k.endswith("0.attention.rotary_emb.inv_freq")}
            ),
            CheckpointError,
            "inv_freq does not hold the rotary frequencies",
        ),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_by_name(tmp_path, change, error, message):
    folder = write_sat(tmp_path / "sat", MemorySource(), 2)
    edit_shard(folder, 1, change)
    with pytest.raises(error, match=message):
        SATCheckpoint(folder)


def test_swapped_shards_are_refused(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource(), 2)
    first, second = (folder / "7" / file_name(rank) for rank in (0, 1))
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    with pytest.raises(CheckpointError, match="shards were swapped"):
        SATCheckpoint(folder)


def test_files_without_rotary_frequencies_need_the_number_of_heads(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource())

    def drop(module):
        for name in [name for name in module if "inv_freq" in name]:
            del module[name]

    edit_shard(folder, 0, drop)
    with pytest.raises(CheckpointError, match="--num-attention-heads"):
        SATCheckpoint(folder)
    assert SATCheckpoint(folder, num_attention_heads=8).dimensions == SMALL


def test_a_wrong_number_of_heads_is_refused(tmp_path):
    folder = write_sat(tmp_path / "sat", MemorySource())
    with pytest.raises(CheckpointError, match="--num-attention-heads 4: .* of 8 heads"):
        SATCheckpoint(folder, num_attention_heads=4)


@pytest.mark.parametrize("tp", [0, 3, 9])
def test_splits_that_cannot_be_are_refused(tp):
    with pytest.raises(ShapeError, match=f"{tp}: "):
        SATWriter(MemorySource().settings, tp, torch.float16, None)
