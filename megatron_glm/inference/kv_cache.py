"""Keys and values of the tokens that rows have seen so far."""

from collections.abc import Hashable, Sequence

import torch


def padded_rows(num_rows: int) -> int:
    """The number of rows that there is memory for: a power of 2 up to 8, then a multiple of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


class KVCache:
    """Keys and values of some rows, each of its own length, left-aligned.

    Rows 0 to `num_rows` - 1 are in use; `lengths` says how many tokens each holds. Memory is taken
    in steps of `STEP` tokens and of `padded_rows` as rows grow. Keys and values of a layer:
    [rows, n, tokens, d].
    """

    STEP = 256

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.lengths: list[int] = []
        self._store = torch.empty(
            (num_layers, 2, 0, num_heads, 0, head_dim), dtype=dtype, device=device
        )

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def memory(self) -> Hashable:
        """What is equal as long as `layer` gives the same memory in the same shape."""
        return self._store.data_ptr(), self._store.shape

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All memory for keys and values of a layer, that of rows that are not in use included."""
        keys, values = self._store[layer]
        return keys, values

    def add_rows(self, lengths: Sequence[int]) -> None:
        """Makes room for new rows behind the others, their tokens to be written by `write_row`."""
        self.lengths += lengths
        self.reserve(max(self.lengths, default=0))

    def add_tokens(self) -> list[int]:
        """Makes room for a token behind every row; returns their indices, to be written there."""
        places = self.lengths
        self.lengths = [length + 1 for length in places]
        self.reserve(max(self.lengths))
        return places

    @torch.inference_mode()
    def reserve(self, length: int) -> None:
        """Makes room for rows of `length` tokens."""
        rows, capacity = self._store.shape[2], self._store.shape[4]
        if self.num_rows <= rows and length <= capacity:
            return
        shape = list(self._store.shape)
        shape[2] = max(padded_rows(self.num_rows), rows)
        shape[4] = max(-(-length // self.STEP) * self.STEP, capacity)
        # Zeros, for what is masked is still multiplied by 0, and memory may hold NaN.
        grown = self._store.new_zeros(shape)
        grown[:, :, :rows, :, :capacity] = self._store
        self._store = grown

    @torch.inference_mode()
    def write_rows(
        self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Stores the first tokens of rows `start` and on. keys, values: [rows, n, tokens, d]."""
        rows, _, tokens, _ = keys.shape
        self._store[layer, 0, start : start + rows, :, :tokens] = keys
        self._store[layer, 1, start : start + rows, :, :tokens] = values

    @torch.inference_mode()
    def append(
        self, layer: int, at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a token of every row at index `at` [rows] and returns views on all keys and values
        up to the longest row's. keys, values: [rows, n, d]."""
        rows, length = self.num_rows, max(self.lengths)
        index = torch.arange(rows, device=at.device)
        stored_keys, stored_values = self._store[layer, :, :rows]
        stored_keys[index, :, at] = keys
        stored_values[index, :, at] = values
        return stored_keys[:, :, :length], stored_values[:, :, :length]

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes a copy of what row rows[i] was; rows may repeat, be left out and be more
        than before."""
        if list(rows) == list(range(self.num_rows)):
            return
        if list(rows) == list(range(len(rows))):
            del self.lengths[len(rows) :]
            return
        self.lengths = [self.lengths[row] for row in rows]
        longest = max(self.lengths)
        self.reserve(longest)
        index = torch.tensor(rows, device=self._store.device)
        for layer in self._store:
            layer[:, : len(rows), :, :longest] = layer[:, :, :, :longest].index_select(1, index)
