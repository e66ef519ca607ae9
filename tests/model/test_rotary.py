"""Angles by position id, in both precisions."""

import numpy as np
import torch

from megatron_glm.model.rotary import rotary_angles


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
