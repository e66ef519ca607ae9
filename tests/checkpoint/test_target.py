"""What a conversion is refused, with the flag and the way out."""

import pytest
import torch

from megatron_glm.checkpoint.errors import CheckpointError, ShapeError
from megatron_glm.checkpoint.table import TABLE, Format
from tests.checkpoint.building import MemorySource, plan


def quantized(bits: int = 4, scales: int = 1) -> MemorySource:
    source = MemorySource()
    source.bits = bits
    source.scales = {row.megatron: scales for row in TABLE if row.quantizable}
    return source


@pytest.mark.parametrize(
    "source, fmt, options, message",
    [
        (MemorySource(), Format.MEGATRON, {"quantization_bit_width": 8}, "bit-width 8: Megatron"),
        (MemorySource(), Format.MEGATRON, {"target_tp": 2}, "--target-tp 2: only SAT"),
        (MemorySource(), Format.HUGGING_FACE, {"target_tp": 2}, "--target-tp 2: only SAT"),
        (MemorySource(), Format.SAT, {"target_tp": 16}, "--target-tp 16"),
        (MemorySource(), Format.SAT, {"quantization_group_size": 8}, "only Hugging Face"),
        (MemorySource(), Format.HUGGING_FACE,
         {"quantization_bit_width": 4, "quantization_group_size": 48}, "divide the 64 columns"),
        (quantized(), Format.MEGATRON, {}, "lost what training needs.*--dtype"),
        (quantized(), Format.SAT, {"quantization_bit_width": 8}, "INT4 already"),
        (quantized(), Format.SAT, {"target_tp": 2}, "cannot be merged or split"),
        (quantized(scales=2), Format.SAT, {}, "cannot be merged or split"),
        (quantized(), Format.HUGGING_FACE, {"quantization_group_size": 8}, "keeps its scales"),
        (quantized(), Format.HUGGING_FACE,
         {"quantization_bit_width": 4, "dtype": torch.float16}, "INT4 already"),
    ],
)  # fmt: skip
def test_refusals_name_the_flag_and_the_way_out(source, fmt, options, message):
    with pytest.raises(CheckpointError, match=message):
        plan(source, fmt, **options)


@pytest.mark.parametrize("fmt", list(Format))
def test_the_type_is_fp16_for_sat_and_kept_otherwise(fmt):
    source = MemorySource(dtype=torch.bfloat16)
    expected = torch.float16 if fmt is Format.SAT else torch.bfloat16
    assert plan(source, fmt).dtype == expected
    assert plan(source, fmt, dtype=torch.float32).dtype == torch.float32


def test_dequantising_has_to_be_asked_for():
    target = plan(quantized(), Format.MEGATRON, dtype=torch.float16)
    assert target.bits is None
    assert plan(quantized(), Format.HUGGING_FACE).bits == 4


def test_groups_are_counted_by_row():
    target = plan(MemorySource(), Format.HUGGING_FACE, quantization_bit_width=4,
                  quantization_group_size=32)  # fmt: skip
    assert sorted(target.scales.values()) == [2, 2, 2, 4]
    with pytest.raises(ShapeError, match="32-bit words"):
        source = MemorySource()
        dimensions = source.settings.dimensions
        odd = type(dimensions)(2, 60, 128, 6, 64)
        plan(MemorySource(odd), Format.HUGGING_FACE, quantization_bit_width=4)
