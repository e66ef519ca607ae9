"""What is dropped: at the right rate, without a pattern, and the same again from the same seed."""

import pytest
import torch

from megatron_glm.model.dropout import Dropout, draw_dropout, drop_channels, keep_mask
from tests.model.attention.packs import random_inputs, run, samples_from

RATE = 0.1
SEED = torch.tensor([20221005, -31337], dtype=torch.int32)


@pytest.fixture(scope="module")
def kept():
    """What is kept, float [2 sequences, 4 heads, 512 queries, 512 keys]."""
    row = torch.arange(8).view(2, 4)
    return keep_mask(Dropout(RATE, SEED), row, torch.arange(512), torch.arange(512)).double()


def z_scores(mean, count):
    """Distance of means of `count` draws from 1 - RATE in their standard deviations."""
    return (mean - (1 - RATE)) / (RATE * (1 - RATE) / count) ** 0.5


def test_rate_in_all_and_of_every_row_column_and_head(kept):
    assert abs(z_scores(kept.mean(), kept.numel())) < 4
    for dims in ((0, 1, 2), (0, 1, 3), (2, 3), (3,), (2,)):
        mean = kept.mean(dim=dims)
        z = z_scores(mean, kept.numel() / mean.numel())
        # Normal scores: unit variance, and no outlier among at most 4096 of them.
        assert z.abs().max() < 5
        # The variance of N draws has the relative deviation sqrt(2 / N).
        assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.5, 0.9])
def test_other_rates(rate):
    token = torch.arange(1024)
    kept = keep_mask(Dropout(rate, SEED), torch.arange(1), token, token).double()
    deviation = (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 4 * deviation


def test_no_correlation_between_neighbours(kept):
    centred = (kept - kept.mean()) / kept.std()
    pairs = {
        "keys": (centred[..., 1:], centred[..., :-1]),
        "keys 64 apart": (centred[..., 64:], centred[..., :-64]),
        "queries": (centred[..., 1:, :], centred[..., :-1, :]),
        "query and key": (centred, centred.mT),
        "diagonal": (centred[..., 1:, 1:], centred[..., :-1, :-1]),
        "heads": (centred[:, 1:], centred[:, :-1]),
        "sequences": (centred[1:], centred[:-1]),
        # Four corners of a rectangle: the word of a pair is a xor of its row's and its column's.
        "rectangles": (
            centred[..., 1:, 1:] * centred[..., :-1, :-1],
            centred[..., 1:, :-1] * centred[..., :-1, 1:],
        ),
    }
    for name, (left, right) in pairs.items():
        assert abs((left * right).mean()) * left.numel() ** 0.5 < 5, name


def test_another_seed_drops_others(kept):
    centred = kept - kept.mean()
    for other_seed in (SEED + torch.tensor([1, 0]), SEED + torch.tensor([0, 1])):
        other = keep_mask(
            Dropout(RATE, other_seed.int()), torch.arange(8).view(2, 4), torch.arange(512),
            torch.arange(512),
        ).double()
        correlation = (centred * (other - other.mean())).mean() / kept.var()
        assert abs(correlation) * kept.numel() ** 0.5 < 5


def test_hidden_states_are_dropped_as_the_first_head_drops(kept):
    """Which has its rate and its lack of a pattern from the tests above."""
    dropped = drop_channels(torch.ones(128, 4, 512), Dropout(RATE, SEED))
    torch.testing.assert_close(dropped.flatten(0, 1).double(), kept[0, 0] / (1 - RATE))
    assert drop_channels(dropped, None) is dropped


def test_the_mean_over_seeds_is_attention_without_dropout():
    samples = samples_from([[(40, 25), (24, 0)]])
    mixed, grad = random_inputs(samples, heads=2, dim=8)
    expected = run("reference", mixed, grad, samples)
    draws = [
        run("chunked", mixed, grad, samples, draw_dropout(RATE, torch.device("cpu")))
        for _ in range(300)
    ]
    for index in range(2):
        values = torch.stack([draw[index] for draw in draws])
        deviation = values.std(dim=0) / len(draws) ** 0.5
        z = (values.mean(dim=0) - expected[index]) / deviation.clamp_min(1e-12)
        assert z[deviation > 1e-9].abs().max() < 6


def test_the_seed_comes_from_the_default_generator():
    torch.manual_seed(7)
    first = draw_dropout(RATE, torch.device("cpu"))
    state = torch.get_rng_state()
    second = draw_dropout(RATE, torch.device("cpu"))
    torch.set_rng_state(state)
    assert torch.equal(draw_dropout(RATE, torch.device("cpu")).seed, second.seed)
    assert not torch.equal(first.seed, second.seed)
    assert first.seed.dtype == torch.int32 and first.seed.shape == (2,)


def test_no_dropout_draws_nothing():
    state = torch.get_rng_state()
    assert draw_dropout(0.0, torch.device("cpu")) is None
    assert torch.equal(torch.get_rng_state(), state)
