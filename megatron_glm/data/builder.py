"""Train, validation and test datasets of a run: sources, splits, and the mix of them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_glm.data.config import GLMDatasetConfig, source_prefixes
from megatron_glm.data.glm_dataset import GLMDataset
from megatron_glm.data.mix import Mix, to_shares

class MixedDataset(torch.utils.data.Dataset):
    """The sequences of a split, each from the source that the mix says."""

    def __init__(self, sources: dict[str, Any], mix: Mix, split: Split, size: int | None) -> None:
        """sources: identity -> dataset. size: what `len` gives; all of every source if None."""
        self.sources = sources
        self.mix = mix
        # Megatron's data loader asks for it.
        self.index_split = split
        self.size = sum(len(source) for source in sources.values()) if size is None else size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        source, place = self.mix.locate(int(index))
        return self.sources[source][place]


def train_valid_test_datasets(
    config: GLMDatasetConfig,
    num_samples: list[int | None],
    is_built_on_rank: Callable[[], bool],
) -> tuple:
    """Builds the datasets of a run on Megatron's builder; all ranks must call it.

    num_samples: sequences of each split, None for one epoch, 0 for a split that is not used.
    is_built_on_rank: whether this rank reads data.

    Returns train, valid, test; None for a split without data or on a rank that reads none. The
    validation split is a list with --multiple-validation-sets. Raises DataError on bad files.
    """
    return tuple(
        _build_split(config, split, num_samples[split.value], is_built_on_rank) for split in Split
    )


def _build_split(
    config: GLMDatasetConfig, split: Split, size: int | None, is_built_on_rank: Callable[[], bool]
) -> Any:
    blend = config.blend if config.blend_per_split is None else config.blend_per_split[split.value]
    if blend is None or size == 0:
        return None
    if config.blend is not None and config.split_matrix[split.value] is None:
        return None
    prefixes, weights = blend
    datasets = [_build(GLMDataset, config, prefix, split, size, is_built_on_rank)
                for prefix in prefixes]
    if any(dataset is None for dataset in datasets):
        return None
    numbers = {prefix: number for number, prefix in enumerate(source_prefixes(config))}
    for prefix, dataset in zip(prefixes, datasets, strict=True):
        dataset.source = numbers[prefix]
    if split == Split.valid and config.multiple_validation_sets:
        return [_mixed([dataset], None, config, split, size) for dataset in datasets]
    return _mixed(datasets, weights, config, split, size)


def _mixed(datasets: list, weights: list | None, config: GLMDatasetConfig, split: Split,
           size: int | None) -> MixedDataset:
    shares = [dataset.epoch.num_sequences for dataset in datasets]
    if weights is not None:
        shares = to_shares(weights)
    identities = [dataset.identity for dataset in datasets]
    mix = Mix.of(dict(zip(identities, shares, strict=True)), {}, 0)
    if split == Split.train:
        mix = mix.continued(config.mix_state, config.consumed_train_samples)
    return MixedDataset(dict(zip(identities, datasets, strict=True)), mix, split, size)


def _build(cls: type, config: GLMDatasetConfig, prefix: str, split: Split, size: int | None,
           is_built_on_rank: Callable[[], bool]) -> Any:
    """One split of one prefix by Megatron's builder, which lets rank 0 go first."""
    sizes: list[int | None] = [0, 0, 0]
    sizes[split.value] = size
    if config.blend is not None:
        only = replace(config, blend=([prefix], None))
        keep = only.split_matrix[split.value]
        only.split_matrix = [keep if other == split else None for other in Split]
    else:
        blends = [([prefix], None) if other == split else None for other in Split]
        only = replace(config, blend_per_split=blends)
    return BlendedMegatronDatasetBuilder(cls, sizes, is_built_on_rank, only).build()[split.value]
