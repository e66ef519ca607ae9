"""Without a GPU, Megatron's random states are those that dropout on the CPU draws from."""

import pytest
import torch

import patches

pytestmark = pytest.mark.skipif(
    "cpu_rng" not in patches.apply(), reason="there is a GPU, where nothing is patched"
)


def test_a_restored_state_repeats_the_dropout_mask():
    state = torch.cuda.get_rng_state()
    first = torch.nn.functional.dropout(torch.ones(64))
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.nn.functional.dropout(torch.ones(64)))


def test_the_tracker_forks_and_returns_without_a_warning(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.cuda.manual_seed(1)
    tracker.add("inner", 2)
    outside = torch.get_rng_state()
    with tracker.fork("inner"):
        inside = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(inside, torch.rand(4, generator=torch.Generator().manual_seed(2)))
    assert not caplog.records
