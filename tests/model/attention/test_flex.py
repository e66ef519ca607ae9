"""The block mask that FlexAttention skips by, against the mask itself."""

import pytest
import torch
from hypothesis import given, settings

from megatron_glm.model.attention.bounds import dense_mask
from megatron_glm.model.attention.flex import BLOCK, block_mask
from tests.model.attention.compiled_flex import compiled_flex
from tests.model.attention.packs import PACKS, packs, random_inputs, run, samples_from


def block_sets(count, indices, num_blocks):
    """bool [b, num_blocks, num_blocks] from the counts and padded indices of a BlockMask."""
    blocks = torch.zeros(count.shape[0], num_blocks, num_blocks, dtype=torch.bool)
    for b in range(count.shape[0]):
        for row in range(num_blocks):
            blocks[b, row, indices[b, 0, row, : count[b, 0, row]].long()] = True
    return blocks


def assert_blocks_equal_mask(batch, seq_length):
    samples = samples_from(batch)
    mask = block_mask(samples, seq_length)
    num_blocks = -(-seq_length // BLOCK)
    partial = block_sets(mask.kv_num_blocks, mask.kv_indices, num_blocks)
    full = block_sets(mask.full_kv_num_blocks, mask.full_kv_indices, num_blocks)
    assert not (partial & full).any()
    dense = dense_mask(samples, seq_length)
    for row in range(num_blocks):
        for column in range(num_blocks):
            area = tuple(slice(i * BLOCK, (i + 1) * BLOCK) for i in (row, column))
            for b in range(len(batch)):
                assert full[b, row, column] == dense[b][area].all()
                # A block may be visited in vain, never missed.
                assert (partial | full)[b, row, column] >= dense[b][area].any()
    transposed = block_sets(mask.q_num_blocks, mask.q_indices, num_blocks)
    assert torch.equal(transposed.mT, partial)


@pytest.mark.parametrize("batch", PACKS.values(), ids=PACKS)
def test_blocks_of_packs(batch):
    assert_blocks_equal_mask(batch, sum(length for length, _ in batch[0]))


@settings(max_examples=20, deadline=None)
@given(pack=packs(max_batch=2, max_length=700))
def test_blocks_of_any_pack(pack):
    seq_length, batch = pack
    assert_blocks_equal_mask(batch, seq_length)


def test_packed_samples_skip_what_lies_outside():
    # Four samples of three blocks: only the 4 * 9 blocks on the diagonal are ever visited, and
    # above the diagonal only those of the contexts, one block each.
    mask = block_mask(samples_from([[(3 * BLOCK, BLOCK)] * 4]), 12 * BLOCK)
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == 4 * 6


def test_a_length_is_compiled_for_once_and_alone_whatever_the_pack(monkeypatch):
    with compiled_flex(monkeypatch) as graphs:

        def step(pack):
            samples = samples_from([pack])  # as many places as there are samples
            run("flex", *random_inputs(samples, 1, 8, torch.float32), samples)
            return graphs

        assert step([(200, 100)]) == [True]
        assert step([(200, 1)]) == [True]
        assert step([(60, 60), (100, 0), (40, 7)]) == [True]
        assert step([(300, 100)]) == [True, True]
        assert step([(200, 50)]) == [True, True]
