"""A micro-batch on its way from the data loader to the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_glm.model.attention.bounds import make_samples
from megatron_glm.model.target_rows import num_rows, rows_of_targets
from megatron_glm.training.agreement import ReadData

# Per token, then per sample of the pack: the order of the columns in the packed tensor.
TOKEN_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
SAMPLE_KEYS = ("context_lengths", "sample_ends", "objectives", "sources")


@dataclass(frozen=True)
class Batch:
    """One micro-batch: b sequences of s tokens, each a pack of at most k samples.

    Sample j of a sequence covers [sample_ends[j - 1], sample_ends[j]); its first
    context_lengths[j] tokens see each other, every later one the context and what precedes it.
    Rows past the last sample have sample_ends = s and objectives = sources = -1.
    """

    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64
    loss_mask: Tensor  # [b, s] float32, 0 or 1
    position_ids: Tensor  # [b, s] int64
    context_lengths: Tensor  # [b, k] int64
    sample_ends: Tensor  # [b, k] int64
    objectives: Tensor  # [b, k] int64, the Objective of each sample
    sources: Tensor  # [b, k] int64, the index of the corpus that each sample is from
    num_targets: int  # of all sequences: the sum of loss_mask, known to the host
    num_places: int  # at most k: a power of two, or k, of places that hold every sequence's samples

    @property
    def samples(self) -> Tensor:
        """What the model takes for a mask: [b, 2, num_places] int32, context lengths and ends."""
        used = slice(self.num_places)
        return make_samples(self.context_lengths[:, used], self.sample_ends[:, used])

    @property
    def target_rows(self) -> Tensor:
        """Of which hidden states, [s * b, h], the model computes logits: [n] int64."""
        size = num_rows(self.num_targets, self.loss_mask.numel())
        return rows_of_targets(self.loss_mask, size)

    def per_token(self, per_sample: Tensor) -> Tensor:
        """Spreads a value of each sample, [b, k], to its tokens, [b, s]."""
        positions = torch.arange(self.tokens.shape[1], device=per_sample.device)
        index = torch.searchsorted(
            self.sample_ends, positions.expand(len(per_sample), -1).contiguous(), right=True
        )
        return per_sample.gather(1, index.clamp_(max=per_sample.shape[1] - 1))


def pack_columns(batch: dict[str, Tensor]) -> Tensor:
    """Collated dataset items as one int64 tensor [b, 4s + 4k]: one upload instead of eight."""
    return torch.cat([batch[key].long() for key in (*TOKEN_KEYS, *SAMPLE_KEYS)], dim=1)


def unpack_columns(
    packed: Tensor, *, seq_length: int, num_samples: int, num_targets: int, num_places: int
) -> Batch:
    """Inverse of `pack_columns` for s = seq_length and k = num_samples."""
    widths = [seq_length] * len(TOKEN_KEYS) + [num_samples] * len(SAMPLE_KEYS)
    columns = dict(zip((*TOKEN_KEYS, *SAMPLE_KEYS), packed.split(widths, dim=1), strict=True))
    # Contiguous: searchsorted copies other layouts at every call, with a warning.
    columns = {key: value.contiguous() for key, value in columns.items()}
    columns["loss_mask"] = columns["loss_mask"].float()
    return Batch(**columns, num_targets=num_targets, num_places=num_places)


def next_batch(
    data_iterator: Iterator,
    *,
    micro_batch_size: int,
    seq_length: int,
    num_samples: int,
    device: torch.device,
    read_data: ReadData,
) -> Batch:
    """The next micro-batch of this rank's data loader, on the device.

    Every rank reads its own, tensor parallel ranks and pipeline stages alike: nothing of it
    travels, and each host knows how many targets and samples there are, which it could not read
    from the device without waiting. `read_data` takes note of it, for ranks to compare.
    """
    columns = next(data_iterator)
    packed = pack_columns(columns)
    width = len(TOKEN_KEYS) * seq_length + len(SAMPLE_KEYS) * num_samples
    if packed.shape != (micro_batch_size, width):
        raise ValueError(
            f"the data loader gave a micro-batch of shape {tuple(packed.shape)}, expected "
            f"{(micro_batch_size, width)}: --seq-length and --max-samples-per-sequence must be "
            "those that the dataset was built with"
        )
    read_data.add(packed)
    return unpack_columns(
        _upload(packed, device), seq_length=seq_length, num_samples=num_samples,
        num_targets=int(columns["loss_mask"].sum()),
        num_places=_num_places(columns["sample_ends"], seq_length),
    )  # fmt: skip


def _num_places(sample_ends: Tensor, seq_length: int) -> int:
    """Most samples of a sequence, padding included, up to a power of two: few sizes, for kernels
    that are planned by size."""
    most = 1 + int((sample_ends < seq_length).sum(dim=1).max())
    return min(1 << (most - 1).bit_length(), sample_ends.shape[1])


def _upload(packed: Tensor, device: torch.device) -> Tensor:
    """Copies to the device behind what it still has to do: from pageable memory, as what the data
    loader pinned is no more once it is concatenated, the host would wait for all of that."""
    if device.type == "cuda":
        packed = packed.pin_memory()
    return packed.to(device, non_blocking=True)
