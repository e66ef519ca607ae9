"""The reference backend against attention written as a sum over what is visible."""

import math

import torch
from hypothesis import given, settings

from tests.model.attention.packs import packs, random_inputs, run, samples_from


def visible_keys(query: int, pack):
    """The keys that a query sees, from the definition."""
    start = 0
    for length, context in pack:
        if query < start + length:
            return range(start, max(query + 1, start + context))
        start += length
    raise IndexError(query)


@settings(max_examples=15, deadline=None)
@given(packs(max_batch=2, max_length=12))
def test_reference_is_the_weighted_mean_of_what_is_visible(pack):
    seq_length, batch = pack
    samples = samples_from(batch)
    mixed, grad = random_inputs(samples, heads=2, dim=4)
    out, _ = run("reference", mixed, grad, samples)
    query, key, value = mixed.split(4, dim=-1)
    for b, sequence in enumerate(batch):
        for i in range(seq_length):
            for n in range(2):
                keys = visible_keys(i, sequence)
                weights = [
                    math.exp(float(query[i, b, n] @ key[j, b, n]) / math.sqrt(4)) for j in keys
                ]
                expected = sum(
                    w * value[j, b, n] for w, j in zip(weights, keys, strict=True)
                ) / sum(weights)
                torch.testing.assert_close(out[i, b, 4 * n : 4 * n + 4], expected)


def test_half_precision_is_computed_in_fp32():
    samples = samples_from([[(40, 25), (24, 0)]])
    mixed, grad = random_inputs(samples, heads=2, dim=16)
    mixed = mixed.half().double()
    exact, _ = run("reference", mixed, grad, samples)
    half, _ = run("reference", mixed.half(), grad.half(), samples)
    assert half.dtype == torch.float16
    # One rounding of the result: half a unit in the last of fp16's 11 bits.
    torch.testing.assert_close(half.double(), exact, rtol=2**-11 * 1.01, atol=1e-7)
