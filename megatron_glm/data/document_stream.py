"""The documents of a corpus, in another random order every epoch, as one line of tokens."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_glm.data.array_cache import load_or_make
from megatron_glm.data.indexed_files import check_ids
from megatron_glm.data.randomness import fingerprint, mix, random_stream

_ORDER_STREAM = -1
_KEPT_EPOCHS = 2


class Passage(NamedTuple):
    """Consecutive tokens of a stream."""

    ids: np.ndarray  # [n] int64
    documents: np.ndarray  # [m] int64, index in the file of each document that it touches
    starts: np.ndarray  # [m] int64, where each begins in ids; starts[0] == 0
    offsets: np.ndarray  # [m] int64, the first token taken of each, counted in the document


class DocumentStream:
    """Some documents of an indexed dataset, end to end, shuffled by (seed, epoch).

    An epoch's order is made when it is first read, in time linear in the number of documents, and
    kept in `cache_dir` where there are many. Offsets are 64-bit.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        documents: np.ndarray,
        seed: int,
        vocab_size: int,
        cache_dir: str | None = None,
    ) -> None:
        """documents: [d], those to read, by their index in the file."""
        self.dataset = dataset
        self.documents = documents
        self.seed = seed
        self.vocab_size = vocab_size
        self.cache_dir = cache_dir
        bounds = dataset.document_indices
        # In most files a document is one sequence, and its length need not be copied.
        self._is_flat = len(bounds) == len(dataset.sequence_lengths) + 1
        lengths = self._lengths(documents)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self.salt = fingerprint(lengths)
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict:
        # A process that is started anew maps or makes them itself, rather than receive a copy.
        return self.__dict__ | {"_orders": OrderedDict()}

    @property
    def mean_document_length(self) -> float:
        return self.num_tokens / max(len(self.documents), 1)

    def read(self, epoch: int, begin: int, count: int) -> Passage:
        """Tokens [begin, begin + count) of an epoch, 0 < count, all inside [0, num_tokens).

        Raises DataError on an id outside the vocabulary.
        """
        order, ends = self.order(epoch)
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, begin + count, side="left"))
        documents = self.documents[order[first : last + 1]].astype(np.int64)
        stops = ends[first : last + 1]
        lengths = self._lengths(documents)
        offsets = np.maximum(begin - (stops - lengths), 0)
        counts = np.minimum(stops, begin + count) - np.maximum(stops - lengths, begin)
        # An empty document in the midst has no part in it.
        documents, offsets, counts = (
            values[counts > 0] for values in (documents, offsets, counts)
        )
        index, reader = self.dataset.index, self.dataset.bin_reader
        begins = offsets * index.dtype_size
        sequences = documents if self._is_flat else self.dataset.document_indices[documents]
        parts = [
            reader.read(dtype=index.dtype, count=int(size), offset=int(place))
            for place, size in zip(index.sequence_pointers[sequences] + begins, counts, strict=True)
        ]
        ids = np.concatenate(parts, dtype=np.int64)
        starts = np.cumsum(counts) - counts
        check_ids(ids, self.vocab_size, self.dataset.path_prefix, documents, starts)
        return Passage(ids, documents, starts, offsets)

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of an epoch: [d] places in `documents`, and [d] int64, where each one ends."""
        if epoch not in self._orders:
            if len(self._orders) == _KEPT_EPOCHS:
                self._orders.popitem(last=False)
            key = mix(self.seed, self.salt)
            self._orders[epoch] = load_or_make(
                self.cache_dir, f"glm-order-{key:016x}-{epoch}", len(self.documents),
                lambda: self._make_order(epoch),
            )
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = random_stream(self.seed, self.salt, epoch, _ORDER_STREAM)
        order = np.arange(len(self.documents), dtype=_index_dtype(len(self.documents)))
        rng.shuffle(order)
        return order, np.cumsum(self._lengths(self.documents[order]), dtype=np.int64)

    def _lengths(self, documents: np.ndarray) -> np.ndarray:
        lengths = self.dataset.sequence_lengths
        if self._is_flat:
            return lengths[documents]
        pointers, bounds = self.dataset.index.sequence_pointers, self.dataset.document_indices
        first, last = bounds[documents], bounds[documents + 1] - 1
        # A document without a sequence may stand at the end of the file.
        begin = pointers[np.minimum(first, len(pointers) - 1)]
        tokens = (pointers[last] - begin) // self.dataset.index.dtype_size + lengths[last]
        return np.where(last >= first, tokens, 0)


def _index_dtype(size: int) -> type:
    return np.int32 if size <= np.iinfo(np.int32).max else np.int64
