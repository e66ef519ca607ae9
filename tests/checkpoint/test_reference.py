"""The plain forward against logits of the released code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_glm.checkpoint.reference import forward, prefix_mask, rotary_tables
from megatron_glm.checkpoint.sat import SATCheckpoint, load_full_state_dict
from tests.checkpoint.building import GOLDEN, GOLDEN_SAT


@pytest.mark.parametrize("tp", GOLDEN_SAT)
@pytest.mark.parametrize("angles, name", [("fp32", "logits"), ("fp16", "logits_fp16_rope")])
def test_logits_equal_the_released_code(tp, angles, name):
    dimensions = SATCheckpoint(GOLDEN_SAT[tp]).dimensions
    weights = load_full_state_dict(GOLDEN_SAT[tp])
    cases = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "cases.npz").items()}
    inputs = cases["tokens"], cases["position_ids"], cases["samples"]
    logits = forward(weights.__getitem__, dimensions, *inputs, angles)
    assert (logits - cases[name]).abs().max() < 1e-4
    if angles == "fp32":
        loss = F.cross_entropy(logits.mT, cases["targets"], reduction="none")
        assert (loss - cases["loss"]).abs().max() < 1e-4


def test_a_token_sees_its_context_and_what_precedes_it_in_its_sample():
    samples = torch.tensor([[[0, 2, 4], [4, 0, 2], [0, 0, 0]]])
    expected = [
        "11000000",
        "11000000",
        "11100000",
        "11110000",
        "00001000",
        "00001100",
        "00000010",
        "00000001",
    ]
    mask = prefix_mask(samples, 8)[0].int()
    assert ["".join(map(str, row)) for row in mask.tolist()] == expected


def test_fp16_angles_are_rounded_at_every_step():
    positions = torch.tensor([[0, 1, 700, 2047]])
    cos, sin = rotary_tables(positions, 16, "fp16")
    for i, position in enumerate(positions[0].tolist()):
        for j in range(16):
            frequency = np.float16(np.float32(1) / np.float32(10000) ** np.float32(j % 8 / 8))
            angle = np.float16(np.float32(position) * np.float32(frequency))
            assert cos[0, 0, i, j] == np.float16(np.cos(np.float32(angle)))
            assert sin[0, 0, i, j] == np.float16(np.sin(np.float32(angle)))
