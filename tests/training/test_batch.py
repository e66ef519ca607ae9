"""The packed columns of a micro-batch, and what is spread from samples to tokens."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_glm.training.batch import (
    SAMPLE_KEYS,
    TOKEN_KEYS,
    next_batch,
    pack_columns,
    unpack_columns,
)
from tests.ranks import run_ranks

SEQUENCE, ROWS = 12, 4


def collated(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {
        key: torch.randint(1000, (2, SEQUENCE), generator=generator) for key in TOKEN_KEYS
    } | {key: torch.randint(9, (2, ROWS), generator=generator) for key in SAMPLE_KEYS}
    batch["loss_mask"] = (batch["loss_mask"] % 2).float()
    batch["sample_ends"] = torch.tensor([[5, 12, 12, 12], [1, 2, 9, 12]])
    batch["sources"] = torch.tensor([[3, 1, -1, -1], [0, 1, 2, -1]])
    return batch


def test_unpacking_restores_every_column():
    batch = collated()
    unpacked = unpack_columns(pack_columns(batch), SEQUENCE, ROWS)
    for key, value in batch.items():
        restored = getattr(unpacked, key)
        assert restored.dtype == value.dtype and torch.equal(restored, value), key


def test_per_token_spreads_by_sample():
    batch = unpack_columns(pack_columns(collated()), SEQUENCE, ROWS)
    assert batch.per_token(batch.sources).tolist() == [
        [3] * 5 + [1] * 7,
        [0, 1] + [2] * 7 + [-1] * 3,
    ]


def batch_of_this_rank() -> dict[str, torch.Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    iterator = iter([collated(seed=5)]) if group.rank() == 0 else None
    batch = next_batch(iterator, micro_batch_size=2, seq_length=SEQUENCE, num_samples=ROWS,
                       device=torch.device("cpu"), tp_group=group)
    return vars(batch)


@pytest.mark.ranks
def test_every_tensor_parallel_rank_has_the_batch_of_the_first():
    expected = collated(seed=5)
    for batch in run_ranks(batch_of_this_rank, world_size=2, tensor_model_parallel_size=2):
        for key, value in expected.items():
            assert torch.equal(batch[key], value), key


@pytest.mark.ranks
def test_a_batch_of_another_shape_names_the_flags():
    run_ranks(refuse_other_shape, world_size=1)


def refuse_other_shape() -> None:
    with pytest.raises(ValueError, match="--seq-length and --max-samples-per-sequence"):
        next_batch(iter([collated()]), micro_batch_size=2, seq_length=SEQUENCE + 1,
                   num_samples=ROWS, device=torch.device("cpu"),
                   tp_group=parallel_state.get_tensor_model_parallel_group())
