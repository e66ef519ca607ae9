"""The packed columns of a micro-batch, and what is spread from samples to tokens."""

import pytest
import torch

from megatron_glm.model.attention.bounds import dense_mask, make_samples
from megatron_glm.training.agreement import ReadData
from megatron_glm.training.batch import (
    SAMPLE_KEYS,
    TOKEN_KEYS,
    Batch,
    next_batch,
    pack_columns,
    unpack_columns,
)

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


def unpack(batch: dict[str, torch.Tensor]) -> Batch:
    return unpack_columns(
        pack_columns(batch), seq_length=SEQUENCE, num_samples=ROWS,
        num_targets=int(batch["loss_mask"].sum()), num_places=ROWS,
    )  # fmt: skip


def test_unpacking_restores_every_column():
    batch = collated()
    unpacked = unpack(batch)
    for key, value in batch.items():
        restored = getattr(unpacked, key)
        assert restored.dtype == value.dtype and torch.equal(restored, value), key


def test_per_token_spreads_by_sample():
    batch = unpack(collated())
    assert batch.per_token(batch.sources).tolist() == [
        [3] * 5 + [1] * 7,
        [0, 1] + [2] * 7 + [-1] * 3,
    ]


def test_the_next_batch_is_that_of_the_loader_and_noted():
    batches, read = iter([collated(5), collated(6)]), ReadData()
    options = dict(micro_batch_size=2, seq_length=SEQUENCE, num_samples=ROWS,
                   device=torch.device("cpu"), read_data=read)
    for seed in (5, 6):
        batch, expected = next_batch(batches, **options), collated(seed)
        assert all(torch.equal(getattr(batch, key), expected[key]) for key in expected)
        assert batch.num_targets == int(expected["loss_mask"].sum())
    noted = ReadData()
    for seed in (6, 5):
        noted.add(pack_columns(collated(seed)))
    assert read.checksum == noted.checksum != ReadData().checksum


@pytest.mark.parametrize("ends, num_places", [
    ([[12, 12, 12, 12], [12, 12, 12, 12]], 1),
    ([[12, 12, 12, 12], [5, 12, 12, 12]], 2),
    ([[2, 4, 12, 12], [5, 12, 12, 12]], 4),
    ([[2, 4, 6, 12], [5, 12, 12, 12]], 4),
])  # fmt: skip
def test_samples_have_no_more_places_than_they_need(ends, num_places):
    columns = collated() | {"sample_ends": torch.tensor(ends)}
    columns["context_lengths"] = torch.tensor([[1, 2, 2, 0]] * 2)
    batch = next_batch(iter([columns]), micro_batch_size=2, seq_length=SEQUENCE, num_samples=ROWS,
                       device=torch.device("cpu"), read_data=ReadData())
    assert batch.samples.shape == (2, 2, num_places)
    every = make_samples(columns["context_lengths"], columns["sample_ends"])
    assert torch.equal(dense_mask(batch.samples, SEQUENCE), dense_mask(every, SEQUENCE))


def test_a_batch_of_another_shape_names_the_flags():
    with pytest.raises(ValueError, match="--seq-length and --max-samples-per-sequence"):
        next_batch(iter([collated()]), micro_batch_size=2, seq_length=SEQUENCE + 1,
                   num_samples=ROWS, device=torch.device("cpu"), read_data=ReadData())
