"""Each filter keeps the tokens that its definition keeps, and draws follow the probabilities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_glm.inference.sampling import keep_top_k, keep_top_p, repeated_ngram_ends, sample

# Few distinct values, so that ties are frequent.
logits = st.lists(st.integers(-6, 6), min_size=2, max_size=20).map(
    lambda values: torch.tensor(values, dtype=torch.float32) / 2
)


def kept(filtered):
    return set(torch.nonzero(filtered > -torch.inf).flatten().tolist())


@settings(deadline=None)
@given(logits, st.integers(0, 25))
def test_top_k(values, k):
    ranked = sorted(values.tolist(), reverse=True)
    least = ranked[min(k, len(ranked)) - 1] if k else -float("inf")
    assert kept(keep_top_k(values, k)) == {i for i, v in enumerate(values.tolist()) if v >= least}


@settings(deadline=None)
@given(logits, st.floats(0.01, 1.0))
def test_top_p_is_the_smallest_set_of_the_likeliest_that_reaches_p(values, p):
    found = kept(keep_top_p(values, p))
    probabilities = values.double().softmax(-1)
    mass = float(probabilities[list(found)].sum())
    assert mass >= p - 1e-6 or len(found) == len(values)
    least = min(float(probabilities[i]) for i in found)
    assert mass - least < p + 1e-6
    assert all(float(probabilities[i]) <= least + 1e-9 for i in set(range(len(values))) - found)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(0, 5))
def test_repeated_ngrams(tokens, size):
    ngrams = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    expected = {
        token
        for token in range(5)
        if size and len(tokens) >= size - 1 and (*tokens[len(tokens) - size + 1 :], token) in ngrams
    }
    assert set(repeated_ngram_ends(tokens, size)) == expected


def draw(values, count, **options):
    generator = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    return torch.tensor([sample(values, generator=generator, **settings) for _ in range(count)])


def test_greedy_takes_the_likeliest():
    assert set(draw(torch.tensor([0.0, 2.0, 1.0]), 10, temperature=0.0).tolist()) == {1}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_probabilities(temperature):
    values = torch.tensor([0.0, 1.0, -1.0, 2.0])
    counts = draw(values, 4000, temperature=temperature).bincount(minlength=4)
    expected = 4000 * (values / temperature).softmax(-1)
    # Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_filters_apply_to_draws_one_after_the_other():
    values = torch.tensor([3.0, 2.9, 2.8, 0.0])
    assert set(draw(values, 200, top_k=2).tolist()) == {0, 1}
    assert set(draw(values, 200, top_p=0.3).tolist()) == {0}
