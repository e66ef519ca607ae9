"""The kernels of decode's attention under Triton's interpreter, against fp64."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch

from megatron_glm.inference import decode_attention
from tests.inference.naive_decode_attention import assert_attends, random_step

PART, MERGED = decode_attention.PART, decode_attention.MERGED


@pytest.mark.parametrize("places, heads, head_dim, capacity", [
    ([0], 1, 64, 256),
    ([0, 1, PART - 1, PART, 2 * PART + 1, 255], 2, 16, 256),
    # No power of two, and a cache that is no multiple of a part.
    ([5, 89], 3, 20, 90),
    ([PART * MERGED - 1, PART * MERGED, PART * MERGED + 9], 1, 8, PART * (MERGED + 1)),
], ids=str)  # fmt: skip
def test_fp32(places, heads, head_dim, capacity):
    step = random_step(places, heads, head_dim, capacity, torch.float32)
    assert_attends(step, tolerance=2**-20)


@pytest.mark.parametrize("dtype, digits", [(torch.float16, 11), (torch.bfloat16, 8)], ids=str)
def test_half_precision(dtype, digits):
    """A unit in the last place: the interpreter truncates to bf16."""
    step = random_step([3, PART + 5], 2, 32, 256, dtype)
    assert_attends(step, tolerance=2.0 ** (1 - digits))
