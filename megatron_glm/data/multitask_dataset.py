"""Prompt/target data as packed sequences (GLM-130B paper, section 2.3)."""

import logging
import os
from typing import NamedTuple

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank

from megatron_glm.data.array_cache import load_or_make
from megatron_glm.data.blank_infilling import Sample, SpecialTokens, prompt_sample
from megatron_glm.data.config import DataError, GLMDatasetConfig
from megatron_glm.data.indexed_files import check_ids, open_indexed_dataset
from megatron_glm.data.packing import best_fit, pack_samples
from megatron_glm.data.randomness import fingerprint, mix, permute

logger = logging.getLogger(__name__)

# What tools/preprocess_data.py appends to a prefix with --json-keys inputs targets.
INPUTS_SUFFIX = "_inputs_document"
TARGETS_SUFFIX = "_targets_document"

# [MASK] and `sop`; `eop` is a label only.
_OVERHEAD = 2


class PromptsAndTargets(NamedTuple):
    """Two indexed datasets; sample i is document i of both."""

    inputs: IndexedDataset
    targets: IndexedDataset


class MultitaskDataset(MegatronDataset):
    """Endless packed sequences of prompt/target samples from one source.

    Samples are put together once, so that they fill their sequences; nothing that a sample sees
    depends on its neighbours, so every epoch keeps them and only reads the sequences in another
    random order. An epoch has every sample exactly once.
    """

    def __init__(
        self,
        indexed_dataset: PromptsAndTargets,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GLMDatasetConfig,
    ) -> None:
        """Megatron's signature.

        indexed_indices: [d], the samples of this split. num_samples: what `len` gives; one epoch's
        sequences where None. Samples whose target does not fit in a sequence are left out, with a
        warning.
        """
        super().__init__(
            indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config
        )
        # Set by the builder, which knows the others.
        self.source = 0
        self.special = SpecialTokens.of(config.tokenizer)
        self._tails = [_tail(dataset, self.special.eod) for dataset in indexed_dataset]
        prompts, targets = (
            dataset.sequence_lengths[indexed_indices].astype(np.int64) - tail
            for dataset, tail in zip(indexed_dataset, self._tails, strict=True)
        )
        self.salt = fingerprint(np.stack((prompts, targets)))
        room = config.sequence_length - _OVERHEAD
        fits = targets <= room
        if not fits.all():
            log_single_rank(
                logger, logging.WARNING,
                f"{dataset_path}: {np.count_nonzero(~fits)} of {len(fits)} samples are left out, "
                f"for their targets exceed the {room} tokens that --seq-length "
                f"{config.sequence_length} has room for",
            )
        lengths = np.minimum(prompts + targets + _OVERHEAD, config.sequence_length)[fits]
        self.samples = indexed_indices[fits]
        self.num_tokens = int(lengths.sum())
        # Padding takes the last row.
        most = config.max_samples_per_sequence - 1
        key = mix(mix(self.salt, config.sequence_length), most)
        self.order, self.ends = load_or_make(
            config.path_to_cache, f"glm-packs-{key:016x}", len(lengths),
            lambda: best_fit(lengths, config.sequence_length, most),
        )

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        return len(self.ends)

    @property
    def identity(self) -> str:
        """Tells this source from others by content, so that files may be moved."""
        return f"{os.path.basename(self.dataset_path)}-{self.salt:016x}"

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: PromptsAndTargets) -> int:
        """Number of samples: what --split divides."""
        return len(low_level_dataset.inputs)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GLMDatasetConfig) -> PromptsAndTargets:
        """Opens the two datasets of a prefix; DataError where they are damaged or do not match."""
        pair = PromptsAndTargets(
            *(open_indexed_dataset(dataset_path + suffix, config.tokenizer, config.mmap_bin_files)
              for suffix in (INPUTS_SUFFIX, TARGETS_SUFFIX))
        )
        if len(pair.inputs) != len(pair.targets):
            raise DataError(
                f"--multitask-data-path {dataset_path}: {len(pair.inputs)} inputs and "
                f"{len(pair.targets)} targets; make both in one run of tools/preprocess_data.py "
                "--json-keys inputs targets"
            )
        return pair

    def __len__(self) -> int:
        return self.num_sequences if self.num_samples is None else self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The packed sequence of any index >= 0, beyond `len` as well; see pack_samples."""
        return pack_samples(
            [sample for _, sample in self.draw(index)], self.source, self.config.sequence_length,
            self.config.max_samples_per_sequence, self.special.pad,
        )

    def draw(self, index: int) -> list[tuple[int, Sample]]:
        """The samples of a sequence, each with its place in the files."""
        epoch, index = divmod(int(index), self.num_sequences)
        key = mix(mix(self.config.random_seed, self.salt), epoch)
        pack = permute(index, self.num_sequences, key)
        begin = int(self.ends[pack - 1]) if pack else 0
        places = self.samples[self.order[begin : int(self.ends[pack])]].tolist()
        return [(place, self._sample(place)) for place in places]

    def target_length(self, place: int) -> int:
        """Tokens of a sample's target in its file. place: the sample's place in the files."""
        return int(self.dataset.targets.sequence_lengths[place]) - self._tails[1]

    def _sample(self, place: int) -> Sample:
        prompt, target = (
            self._read(dataset, place, tail)
            for dataset, tail in zip(self.dataset, self._tails, strict=True)
        )
        return prompt_sample(
            prompt, target, self.config.sequence_length, self.special,
            self.config.unified_multitask_encoding,
        )

    def _read(self, dataset: IndexedDataset, place: int, tail: int) -> np.ndarray:
        ids = dataset[place].astype(np.int64)
        check_ids(ids, self.config.tokenizer.vocab_size, dataset.path_prefix, place)
        if tail and (len(ids) == 0 or ids[-1] != self.special.eod):
            raise DataError(
                f"{dataset.path_prefix}.bin: document {place} does not end in the end-of-document "
                "token, as the first does; make the data again, with or without --append-eod"
            )
        return ids[: len(ids) - tail]


def _tail(dataset: IndexedDataset, eod: int) -> int:
    """Tokens at the end of every document that are not of the sample: `eod`, with --append-eod."""
    first = dataset[0]
    return int(len(first) > 0 and first[-1] == eod)
