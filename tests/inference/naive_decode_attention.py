"""Attention of a step of decode, one row and head at a time in fp64."""

from typing import NamedTuple

import torch

from megatron_glm.inference.decode_attention import attend
from megatron_glm.model.rotary import RotaryTable, rotate

SPARE_ROWS = 2


class Step(NamedTuple):
    """Arguments of `attend`."""

    qkv: torch.Tensor
    rotation: torch.Tensor
    places: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def random_step(places, heads, head_dim, capacity, dtype) -> Step:
    """A cache with NaN wherever a row does not reach, and behind the rows."""
    generator = torch.Generator().manual_seed(sum(places))
    qkv = torch.randn(len(places), heads, 3, head_dim, generator=generator).to(dtype)
    shape = len(places) + SPARE_ROWS, heads, capacity, head_dim
    keys, values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    for kept in (keys, values):
        for row, place in enumerate(places):
            new = torch.randn(heads, place, head_dim, generator=generator)
            kept[row, :, :place] = new.to(dtype)
    positions = torch.randint(64, (1, len(places)), generator=generator)
    rotation = RotaryTable(64, head_dim, 10000, "fp32")(positions)
    return Step(qkv, rotation, torch.tensor(places), keys, values)


def assert_attends(step: Step, tolerance: float) -> None:
    """tolerance: of the largest of the exact result."""
    expected = Step(*(x.clone() for x in step))
    exact = _attend(expected)
    found = attend(*step)
    assert found.dtype == step.qkv.dtype
    assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
    for kept, wanted in ((step.keys, expected.keys), (step.values, expected.values)):
        assert torch.equal(kept.isnan(), wanted.isnan())
        error = (kept.nan_to_num().double() - wanted.nan_to_num().double()).abs().max()
        assert error <= tolerance * wanted.nan_to_num().abs().max()


def _attend(step: Step) -> torch.Tensor:
    """Puts the new tokens into the cache of `step`, too."""
    query, key = rotate(step.qkv[:, :, :2].float(), step.rotation).to(step.qkv.dtype).unbind(2)
    out = torch.empty_like(query, dtype=torch.float64)
    for row, place in enumerate(step.places.tolist()):
        step.keys[row, :, place] = key[row]
        step.values[row, :, place] = step.qkv[row, :, 2]
        for head in range(query.shape[1]):
            keys = step.keys[row, head, : place + 1].double()
            scores = keys @ query[row, head].double() / keys.shape[1] ** 0.5
            values = step.values[row, head, : place + 1].double()
            out[row, head] = scores.softmax(0) @ values
    return out
