"""Every rank reads its part of a weight, quantised or not, and the parts make up the whole."""

import pytest
import torch

from megatron_glm.checkpoint.errors import CheckpointError, ShapeError
from megatron_glm.checkpoint.quantization import QuantizedWeight, quantize
from megatron_glm.checkpoint.table import TABLE
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.weights import Weights
from tests.checkpoint.building import MemorySource
from tests.inference.building import CPU

LINEARS = {
    row.megatron.format(0).removesuffix(".weight"): row.split for row in TABLE if row.quantizable
}


def read(source, name, tp_size=1, bits=None):
    """The linear layer of every rank."""
    return [
        Weights(source, Layout(tp_size, 1, rank), CPU, torch.float32, bits).linear(name)
        for rank in range(tp_size)
    ]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("name", LINEARS)
def test_products_of_parts_make_up_the_whole(name, tp_size, bits):
    source = MemorySource(dtype=torch.float32)
    (whole,) = read(source, name, 1, bits)
    x = torch.randn(3, source.weights[f"{name}.weight"].shape[1])
    ranks = read(source, name, tp_size, bits)
    if LINEARS[name] == 1:
        # Row-parallel: inputs are split, outputs are sums, and each rank adds the bias here.
        parts = x.chunk(tp_size, dim=1)
        found = sum(rank(part) - rank.bias for rank, part in zip(ranks, parts, strict=True))
        found += ranks[0].bias
    else:
        outputs = [rank(x) for rank in ranks]
        halves = [output.chunk(2, dim=1) for output in outputs]
        is_gated = "fc1" in name
        found = torch.cat(
            [half[i] for i in range(2) for half in halves] if is_gated else outputs, dim=1
        )
    torch.testing.assert_close(found, whole(x), atol=1e-4, rtol=0)


def quantized_source(groups, bits=4):
    """A source whose row-parallel weights have `groups` scales a row, as SAT at that TP."""
    source = MemorySource(dtype=torch.float32)
    plain = source.read
    source.bits = bits

    def read(tensor):
        value = plain(tensor)
        if not tensor.row.quantizable:
            return value
        return quantize(value, bits, groups if tensor.row.split == 1 else 1)

    source.read = read
    return source


@pytest.mark.parametrize("groups, tp_size", [(1, 4), (2, 2), (4, 2), (2, 4)])
def test_scales_of_shards_go_to_the_ranks_that_hold_their_columns(groups, tp_size):
    source = quantized_source(groups)
    name = "decoder.layers.0.mlp.linear_fc2"
    (whole,) = read(source, name)
    x = torch.randn(3, 128)
    found = sum(
        rank(part) - rank.bias
        for rank, part in zip(read(source, name, tp_size), x.chunk(tp_size, 1), strict=True)
    )
    torch.testing.assert_close(found, whole(x) - whole.bias, atol=1e-4, rtol=0)


def test_scales_that_ranks_cannot_share_are_refused():
    with pytest.raises(CheckpointError, match="tensor-model-parallel-size 2: .*3 scales a row"):
        weights = Weights(MemorySource(), Layout(2), CPU, torch.float32)
        codes = torch.zeros(64, 12, dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.ones(64, 3, dtype=torch.float16), 4)
        weights._shard_quantized("decoder.layers.0.mlp.linear_fc2.weight", weight)


def test_quantised_weights_are_not_quantised_again():
    with pytest.raises(CheckpointError, match="--quantization-bit-width 8: .*INT4"):
        Weights(quantized_source(1), Layout(), CPU, torch.float32, bits=8)


def test_a_layout_that_does_not_divide_the_model_is_refused():
    with pytest.raises(ShapeError, match="tensor parallel size 3"):
        Weights(MemorySource(), Layout(3), CPU, torch.float32)


def test_a_weight_that_fp16_cannot_hold_is_named():
    source = MemorySource(dtype=torch.float32)
    name = "decoder.layers.0.mlp.linear_fc2"
    source.weights[f"{name}.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=f"{name}.weight: .*65504"):
        read(source, name, bits=8)
