"""What a GPU's memory is for `machine`: copies of tensors that lie far apart."""

from collections.abc import Sequence

import numpy as np
import torch

FIRST_ADDRESS = 1 << 40
"""No address fits into 32 bits."""
GAP = 1 << 20
"""Bytes between tensors, at least."""


class Memory:
    """Copies of the storages of tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._storages, size = {}, GAP
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._storages:
                content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                self._storages[storage.data_ptr()] = size, content
                size += (len(content) + 2 * GAP) // GAP * GAP
        self.bytes = np.zeros(size, np.uint8)
        for start, content in self._storages.values():
            self.bytes[start : start + len(content)] = content
        self._ranges = set()
        for tensor in tensors:
            start = self.address_of(tensor) - FIRST_ADDRESS
            dimensions = zip(tensor.shape, tensor.stride(), strict=True)
            last = sum((size - 1) * step for size, step in dimensions)
            self._ranges.add((start, start + (last + 1) * tensor.itemsize))

    def address_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage().data_ptr()
        return FIRST_ADDRESS + self._storages[storage][0] + tensor.data_ptr() - storage

    def places(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """Indices of so many bytes from each address, [addresses, count]."""
        places = addresses.astype(np.int64) - FIRST_ADDRESS
        inside = np.zeros(places.shape, bool)
        for start, end in self._ranges:
            inside |= (places >= start) & (places + count <= end)
        if not inside.all():
            raise IndexError("an address outside of the tensors")
        return places[:, None] + np.arange(count)

    def write_back(self) -> None:
        for start, content in self._storages.values():
            content[:] = self.bytes[start : start + len(content)]
