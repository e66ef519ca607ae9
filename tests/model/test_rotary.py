"""Angles by position id, in both precisions, and the table that is gathered from them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

from megatron_glm.model.rotary import ANGLE_DTYPES, RotaryTable, rotary_angles, rotate_query_key


def test_angles_follow_position_ids_and_repeat_with_them():
    position_ids = torch.tensor([[0, 5, 5, 2]])
    angles = rotary_angles(position_ids, 8, 10000.0, torch.float32)
    assert angles.shape == (4, 1, 1, 8)
    frequencies = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    for row, position in enumerate(position_ids[0].tolist()):
        expected = np.tile(position * frequencies, 2)
        np.testing.assert_allclose(angles[row, 0, 0], expected, rtol=1e-6)


def test_fp16_angles_round_at_every_step():
    """numpy's own fp16 arithmetic is the oracle; at the end of the context it is far from fp32."""
    position_ids = torch.arange(2048)[None]
    angles = rotary_angles(position_ids, 128, 10000.0, torch.float16)
    inverse = (1.0 / 10000.0 ** (np.arange(0, 128, 2, dtype=np.float32) / 128)).astype(np.float16)
    expected = np.arange(2048, dtype=np.float16)[:, None] * inverse
    assert expected.dtype == np.float16
    np.testing.assert_array_equal(angles[:, 0, 0, :64].numpy(), expected)
    exact = rotary_angles(position_ids, 128, 10000.0, torch.float32)
    assert 0.9 < (angles.float() - exact).abs().max() < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("angle_dtype", ANGLE_DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 128])
def test_the_table_rotates_bit_for_bit_as_megatron_does_by_angles(dim, angle_dtype, dtype):
    torch.manual_seed(0)
    position_ids = torch.randint(2048, (3, 33))
    mixed = torch.randn(33, 3, 2, 3 * dim).to(dtype).requires_grad_()
    bias = torch.randn(2 * 3 * dim).to(dtype).requires_grad_()
    grads = [torch.randn(33, 3, 2, dim).to(dtype) for _ in range(3)]
    angles = rotary_angles(position_ids, dim, 10000.0, ANGLE_DTYPES[angle_dtype])
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False)
    query, key, value = (mixed.flatten(2) + bias).view_as(mixed).split(dim, dim=-1)
    query, key = (
        apply_rotary_pos_emb(x, angles, config, cp_group="unused") for x in (query, key)
    )
    expected = query, key, value, *torch.autograd.grad((query, key, value), (mixed, bias), grads)

    rotation = RotaryTable(2048, dim, 10000.0, angle_dtype)(position_ids)
    out = rotate_query_key(mixed, bias, rotation)
    for actual, wanted in zip((*out, *torch.autograd.grad(out, (mixed, bias), grads)), expected,
                              strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("position", [8, -1])
def test_a_position_outside_the_table_is_an_error(position):
    table = RotaryTable(8, 16, 10000.0, "fp32")
    table(torch.tensor([[0, 7]]))
    with pytest.raises(IndexError):
        table(torch.tensor([[0, position]]))
