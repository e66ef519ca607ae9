"""Whether the ranks that share a model are training on the same text."""

import torch
from isal import isal_zlib
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_glm.errors import GLMError


class DisagreementError(GLMError):
    """Ranks that share a model have read different data; those of other replicas do not see it."""


class ReadData:
    """What this rank's data loader gave so far, as a number to compare with that of other ranks.

    Every rank reads for itself: tensor parallel ranks and pipeline stages alike. Were one of them
    to read other data, from a node with an old copy, say, the run would go on and learn nonsense.
    """

    def __init__(self):
        self.checksum = 0
        """Of all batches, whatever their order, in which pipeline stages differ."""
        self.is_compared = False

    def add(self, batch: Tensor) -> None:
        """batch: contiguous, on the CPU."""
        self.checksum = (self.checksum + isal_zlib.crc32(batch.numpy())) % 2**62

    def compare(self, iteration: int, group: ProcessGroup, device: torch.device) -> None:
        """Raises DisagreementError on every rank of `group` where one has read other data.

        device: where the group's collectives work.
        """
        self.is_compared = True
        if group.size() == 1:
            return
        own = torch.tensor([self.checksum], device=device)
        sums = own.new_empty(group.size())
        torch.distributed.all_gather_into_tensor(sums, own, group=group)
        sums = sums.tolist()
        if len(set(sums)) > 1:
            usual = max(set(sums), key=sums.count)
            ranks = torch.distributed.get_process_group_ranks(group)
            others = [rank for rank, each in zip(ranks, sums, strict=True) if each != usual]
            raise DisagreementError(
                f"iteration {iteration}: rank {', '.join(map(str, others))} read other data than "
                f"the other ranks of the model ({ranks[0]} to {ranks[-1]}); the last checkpoint is "
                "untouched. All nodes must see the same files under --data-path and "
                "--data-cache-path: compare them with tools/verify_data.py, and delete the cache"
            )
