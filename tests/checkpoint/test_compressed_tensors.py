"""The pack-quantized format against the library that defines it."""

import pytest
import torch

from megatron_glm.checkpoint.compressed_tensors import bits_of, pack, quantization_config, unpack
from megatron_glm.checkpoint.errors import CheckpointError, ShapeError


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_those_of_the_library(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (50, 64), dtype=torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits), codes)


def test_rows_that_do_not_fill_words_are_refused():
    with pytest.raises(ShapeError, match="20 columns of 4 bits"):
        pack(torch.zeros(2, 20, dtype=torch.int8), 4)


def test_the_configuration_is_one_that_the_library_accepts_and_that_matches_the_layers():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = quantization_config(4, {"mlp.down_proj": 128, "self_attn.o_proj": None})
    assert bits_of(config, "here") == 4
    parsed = quantization.QuantizationConfig.model_validate(config)
    sizes = {
        target: group.weights.group_size
        for group in parsed.config_groups.values()
        for target in group.targets
    }
    assert sizes == {r"re:.*\.mlp\.down_proj$": 128, r"re:.*\.self_attn\.o_proj$": None}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "marlin-24"},
        {"config_groups": {}},
        {"config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "symmetric": False}}}},
        {"config_groups": {"g": {"weights": {"num_bits": 3, "type": "int", "symmetric": True}}}},
        {"config_groups": None},
    ],
)
def test_other_schemes_are_refused(change):
    with pytest.raises(CheckpointError, match="here: quantization_config"):
        bits_of(quantization_config(4, {"mlp.down_proj": None}) | change, "here")
