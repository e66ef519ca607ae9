"""Text as packed sequences of blanks: each a function of (seed, epoch, index) alone."""

import os

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split

from megatron_glm.data.blank_infilling import Sample
from megatron_glm.data.config import GLMDatasetConfig
from megatron_glm.data.corruption import Corruption, Part
from megatron_glm.data.document_stream import DocumentStream, Passage
from megatron_glm.data.indexed_files import open_indexed_dataset
from megatron_glm.data.packing import pack_samples
from megatron_glm.data.randomness import mix, permute, random_stream
from megatron_glm.data.sequence_kinds import Epoch, SequenceKind, sequence_kinds

_SHUFFLE_STREAM = -2


class GLMDataset(MegatronDataset):
    """Endless packed sequences from one indexed dataset.

    An epoch reads every token of its documents exactly once: documents in a random order, cut into
    sequences of several kinds, which follow one another in a random order. Which one an index
    means is computed, not looked up, so that a run begins anywhere at once.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GLMDatasetConfig,
    ) -> None:
        """Megatron's signature.

        indexed_indices: [d], the documents of this split. num_samples: what `len` gives; one
        epoch's sequences where None.
        """
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        # Set by the builder, which knows the others.
        self.source = 0
        self.stream = DocumentStream(
            indexed_dataset, indexed_indices, config.random_seed, config.tokenizer.vocab_size,
            config.path_to_cache,
        )
        self.epoch = Epoch.of(
            sequence_kinds(config, self.stream.mean_document_length), self.stream.num_tokens
        )
        self.corrupt = Corruption(config)
        # Made here, where Megatron lets rank 0 go first, and inherited by forked workers.
        self.stream.order(0)

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        return self.epoch.num_sequences

    @property
    def identity(self) -> str:
        """Tells this source from others by content, so that files may be moved."""
        return f"{os.path.basename(self.dataset_path)}-{self.stream.salt:016x}"

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Number of documents: what --split divides."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GLMDatasetConfig) -> IndexedDataset:
        """Opens a prefix; DataError where its files are damaged or of another tokenizer."""
        return open_indexed_dataset(dataset_path, config.tokenizer, config.mmap_bin_files)

    def __len__(self) -> int:
        return self.num_sequences if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The packed sequence of any index >= 0, beyond `len` as well; see pack_samples."""
        _, _, samples = self.draw(index)
        return pack_samples(
            [sample for _, sample in samples], self.source, self.config.sequence_length,
            self.config.max_samples_per_sequence, self.corrupt.special.pad,
        )

    def draw(self, index: int) -> tuple[SequenceKind, Passage, list[tuple[Part, Sample]]]:
        """What a sequence is made of: its kind, its text, and the samples made of that."""
        epoch, index = divmod(int(index), self.num_sequences)
        seed, salt = self.config.random_seed, self.stream.salt
        key = mix(mix(seed, salt), mix(epoch, _SHUFFLE_STREAM))
        place = permute(index, self.num_sequences, key)
        kind, begin, count = self.epoch.locate(place)
        passage = self.stream.read(epoch, begin, count)
        rng = random_stream(seed, salt, epoch, place)
        return kind, passage, self.corrupt(rng, kind, passage.ids, passage.starts)
