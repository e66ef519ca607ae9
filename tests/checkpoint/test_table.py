"""The table of weights: names, shapes, and how each format cuts a tensor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_glm.checkpoint.errors import ShapeError, UnknownTensorError
from megatron_glm.checkpoint.table import (
    Dimensions,
    Format,
    check_tensor_parallel_size,
    find,
    parts,
    regions,
    shard,
    shard_shape,
    tensors,
)
from tests.checkpoint.building import GOLDEN_SAT, SMALL

MEGATRON, SAT, HF = Format.MEGATRON, Format.SAT, Format.HUGGING_FACE
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
FC1 = "decoder.layers.1.mlp.linear_fc1.weight"


def test_names_and_shapes_are_those_of_the_released_code():
    module = torch.load(
        GOLDEN_SAT[1] / "1" / "mp_rank_00_model_states.pt", weights_only=True
    )["module"]  # fmt: skip
    dimensions = Dimensions(4, 64, 176, 4, 512)
    table = {t.name(SAT): t.shape(dimensions) for t in tensors(dimensions)}
    stored = {name: tuple(value.shape) for name, value in module.items() if "inv_freq" not in name}
    assert table == stored
    assert list(table) == list(stored)


@pytest.mark.parametrize("fmt", list(Format))
def test_every_name_leads_back_to_its_tensor(fmt):
    everything = list(tensors(SMALL))
    assert [find(fmt, tensor.name(fmt)) for tensor in everything] == everything
    assert len({tensor.name(fmt) for tensor in everything}) == len(everything)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.{}.mlp.linear_fc1.weight",
        "decoder.layers.01.mlp.linear_fc1.weight",
        "decoder.layers.-1.mlp.linear_fc1.weight",
        "transformer.word_embeddings.weight",
    ],
)
def test_a_name_not_in_the_table_is_an_error_with_the_name(name):
    with pytest.raises(UnknownTensorError, match=name.replace("{}", ".*")):
        find(MEGATRON, name)


@given(tp=st.sampled_from([1, 2, 4, 8]), fmt=st.sampled_from(list(Format)), data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_parts_of_all_ranks_hold_every_element_once(tp, fmt, data):
    tensor = data.draw(st.sampled_from([t for t in tensors(SMALL) if t.row.split is not None]))
    whole = torch.arange(torch.Size(tensor.shape(SMALL)).numel()).view(tensor.shape(SMALL))
    shards = [shard(tensor.name(MEGATRON), whole, rank, tp, fmt) for rank in range(tp)]
    assert {tuple(s.shape) for s in shards} == {shard_shape(tensor, SMALL, tp)}
    again = torch.zeros_like(whole)
    for rank, piece in enumerate(shards):
        views = parts(tensor.row, again, fmt, rank, tp)
        for view, values in zip(
            views, piece.split([v.shape[tensor.row.split] for v in views], tensor.row.split),
            strict=True,
        ):  # fmt: skip
            view.copy_(values)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_geglu_is_swapped_and_each_half_split_by_itself(tp):
    gated, linear = torch.randn(128, 64), torch.randn(128, 64)
    whole = torch.cat((gated, linear))
    for rank in range(tp):
        in_sat = torch.cat((linear.chunk(tp)[rank], gated.chunk(tp)[rank]))
        in_megatron = torch.cat((gated.chunk(tp)[rank], linear.chunk(tp)[rank]))
        assert torch.equal(shard(FC1, whole, rank, tp, SAT), in_sat)
        assert torch.equal(shard(FC1, whole, rank, tp, MEGATRON), in_megatron)


@pytest.mark.parametrize("fmt", [MEGATRON, SAT])
def test_ranks_hold_whole_heads_of_q_k_and_v(fmt):
    heads = torch.randn(8, 3, 8, 64)
    for rank in range(4):
        expected = heads[2 * rank : 2 * rank + 2].reshape(48, 64)
        assert torch.equal(shard(QKV, heads.reshape(192, 64), rank, 4, fmt), expected)


def test_a_size_that_does_not_split_is_refused_by_name():
    check_tensor_parallel_size(SMALL, 8)
    with pytest.raises(ShapeError, match="size 3: must divide num_attention_heads 8"):
        check_tensor_parallel_size(SMALL, 3)
    with pytest.raises(ShapeError, match="ffn_hidden_size 100"):
        check_tensor_parallel_size(Dimensions(1, 64, 100, 8, 64), 8)
    with pytest.raises(ShapeError, match="linear_fc1"):
        regions(find(MEGATRON, FC1).row, MEGATRON, 250, 0, 2)


@pytest.mark.parametrize(
    "sizes, message",
    [((0, 64, 128, 8, 64), "num_layers 0"), ((2, 64, 128, 24, 64), "num_attention_heads 24")],
)
def test_sizes_that_no_model_has_are_refused(sizes, message):
    with pytest.raises(ShapeError, match=message):
        Dimensions(*sizes)
