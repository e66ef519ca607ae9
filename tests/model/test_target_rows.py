"""Logits of targets alone: the same losses and gradients as with all logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.model.target_rows import (
    NUM_SIZES,
    num_rows,
    rows_of_targets,
    select_rows,
    spread_rows,
)
from tests.model.building import build_glm
from tests.ranks import run_ranks

VOCABULARY, SEQUENCE, BATCH = 96, 32, 2


@given(st.integers(1, 9000), st.data())
def test_rows_suffice_in_few_sizes(num_tokens, data):
    sizes = {num_rows(n, num_tokens) for n in range(0, num_tokens + 1, max(1, num_tokens // 99))}
    num_targets = data.draw(st.integers(0, num_tokens))
    assert max(1, num_targets) <= num_rows(num_targets, num_tokens) <= num_tokens
    assert num_rows(num_targets, num_tokens) - num_targets <= -(-num_tokens // NUM_SIZES)
    assert len(sizes) <= NUM_SIZES


def test_all_targets_are_among_the_rows_and_no_row_is_twice():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mask = torch.randint(2, (BATCH, SEQUENCE), generator=generator).float()
        rows = rows_of_targets(mask, num_rows(int(mask.sum()), mask.numel()))
        assert len(rows.unique()) == len(rows)
        # Row i of [s * b, h] is token i // b of sequence i % b.
        reached = torch.zeros_like(mask)
        reached[rows % BATCH, rows // BATCH] = 1
        assert torch.equal(reached * mask, mask)


def test_selecting_and_spreading_pass_gradcheck():
    values = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 6])
    assert torch.autograd.gradcheck(lambda x: select_rows(x, rows), values)
    assert torch.equal(select_rows(values, rows), values[rows])
    chosen = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spread_rows(x, rows, 7), chosen)


def losses_and_gradients(sequence_parallel: bool, share: float) -> list[tuple]:
    """With all logits and with those of targets: what a step sees of either."""
    results = []
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    mask = (torch.rand(BATCH, SEQUENCE, generator=generator) < share).float()
    rows = rows_of_targets(mask, num_rows(int(mask.sum()), mask.numel()))
    positions = torch.arange(SEQUENCE).expand(BATCH, -1)
    samples = torch.tensor([[[9], [SEQUENCE]]] * BATCH, dtype=torch.int32)
    (model,) = build_glm(
        vocab_size=VOCABULARY, seq_length=SEQUENCE, sequence_parallel=sequence_parallel
    )
    sizes = []
    model.output_layer.register_forward_hook(
        lambda module, given, output: sizes.append(output[0].shape[:2].numel())
    )
    for target_rows in (None, rows):
        losses = model(tokens, positions, samples, labels=tokens, target_rows=target_rows)
        model.zero_grad()
        (losses * mask).sum().backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        results.append((losses.detach() * mask, gradients, sizes.pop()))
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_losses_and_gradients_are_those_of_all_logits(tp, sequence_parallel, share):
    ranks = run_ranks(losses_and_gradients, sequence_parallel, share, world_size=tp,
                      tensor_model_parallel_size=tp)
    for (expected, expected_gradients, all_rows), (losses, gradients, rows) in ranks:
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected_gradients[name], rtol=1e-4, atol=1e-5, msg=name
            )
        num_targets = int((expected != 0).sum())
        assert (rows, all_rows) == (num_rows(num_targets, BATCH * SEQUENCE), BATCH * SEQUENCE)
