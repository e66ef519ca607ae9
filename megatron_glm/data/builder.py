"""Train, validation and test datasets of a run: sources, splits, and the mix of them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from operator import attrgetter

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.utils import log_single_rank

from megatron_glm.data.config import (
    DataError,
    GLMDatasetConfig,
    multitask_blend,
    source_prefixes,
)
from megatron_glm.data.glm_dataset import GLMDataset
from megatron_glm.data.mix import Mix, to_shares
from megatron_glm.data.multitask_dataset import MultitaskDataset

logger = logging.getLogger(__name__)

Source = GLMDataset | MultitaskDataset


class MixedDataset(torch.utils.data.Dataset):
    """The sequences of a split, each from the source that the mix says."""

    def __init__(
        self, sources: dict[str, Source], mix: Mix, split: Split, num_samples: int | None
    ) -> None:
        """sources: identity -> dataset. num_samples: what `len` gives; all of every source if
        None."""
        self.sources = sources
        self.mix = mix
        # Megatron's data loader asks for it.
        self.index_split = split
        self.num_samples = (
            sum(source.num_sequences for source in sources.values())
            if num_samples is None else num_samples
        )

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """The packed sequence at an index of the run; see pack_samples."""
        identity, place = self.mix.locate(int(index))
        return self.sources[identity][place]


def train_valid_test_datasets(
    config: GLMDatasetConfig, num_samples: list[int | None]
) -> tuple:
    """Builds the datasets of a run on Megatron's builder; all ranks must call it.

    num_samples: sequences of each split, None for one epoch, 0 for a split that is not used.

    Returns train, valid, test: a MixedDataset, or None for a split without data. Raises DataError
    on files or flags that cannot be used.
    """
    return tuple(_build_split(config, split, num_samples[split.value]) for split in Split)


def _build_split(
    config: GLMDatasetConfig, split: Split, num_samples: int | None
) -> MixedDataset | None:
    blend = config.blend if config.blend is not None else config.blend_per_split[split.value]
    if blend is None or num_samples == 0:
        return None

    def build(cls: type, blend: tuple | None) -> dict[str, tuple[Source, float | None]]:
        prefixes, weights = blend or ([], None)
        datasets = [_build(cls, config, prefix, split, num_samples) for prefix in prefixes]
        return _with_data(datasets, weights or [None] * len(prefixes), split)

    text, multitask = build(GLMDataset, blend), build(
        MultitaskDataset, multitask_blend(config, split)
    )
    if not text:
        return None
    numbers = {prefix: number for number, prefix in enumerate(source_prefixes(config))}
    for dataset, _ in (text | multitask).values():
        dataset.source = numbers[dataset.dataset_path]
    if num_samples is None:
        # Every sequence of every source once: all of them in proportion to their number.
        text = {identity: (one, None) for identity, (one, _) in (text | multitask).items()}
        multitask = {}
    return _mixed(config, text, multitask, split, num_samples)


def _with_data(
    datasets: list[Source | None], weights: list[float | None], split: Split
) -> dict[str, tuple[Source, float | None]]:
    """Datasets and weights by identity, without those that --split leaves nothing."""
    result: dict[str, tuple[Source, float | None]] = {}
    for dataset, weight in zip(datasets, weights, strict=True):
        if dataset is None:
            continue
        if dataset.num_sequences == 0:
            message = (
                f"{dataset.dataset_path}: --split leaves no data to the {split.name} split; give "
                "it a larger share, or more data"
            )
            if split == Split.train:
                raise DataError(message)
            log_single_rank(logger, logging.WARNING, message)
            continue
        if dataset.identity in result:
            raise DataError(
                f"{dataset.dataset_path}: given twice, or of the same content as another source; "
                "give it once, with the sum of the weights"
            )
        result[dataset.identity] = (dataset, weight)
    return result


def _mixed(
    config: GLMDatasetConfig,
    text: dict[str, tuple[Source, float | None]],
    multitask: dict[str, tuple[Source, float | None]],
    split: Split,
    num_samples: int | None,
) -> MixedDataset:
    text_shares = _shares(text, attrgetter("num_sequences"))
    multitask_shares = _shares(multitask, partial(_multitask_weight, config))
    is_train = split == Split.train
    mix = Mix.of(
        text_shares,
        multitask_shares,
        _sequence_share(config, multitask, multitask_shares),
        config.multitask_ramp_samples if is_train else 0,
    )
    if is_train and config.mix_state is not None:
        if change := mix.change_in_words(config.mix_state):
            log_single_rank(
                logger, logging.WARNING,
                f"the mix of data is another one from sequence {config.consumed_train_samples} on: "
                f"{change}",
            )
        mix = mix.continued(config.mix_state, config.consumed_train_samples)
    sources = {identity: dataset for identity, (dataset, _) in (text | multitask).items()}
    if is_train and num_samples is not None:
        for identity, count in mix.counts(max(num_samples, mix.start)).items():
            _log_epochs(sources[identity], count)
    return MixedDataset(sources, mix, split, num_samples)


def _log_epochs(source: Source, num_sequences: int) -> None:
    """Says how often a run reads a source, which may be far more often than is good."""
    epochs = num_sequences / source.num_sequences
    log_single_rank(
        logger, logging.INFO,
        f"{source.dataset_path}: {num_sequences:,} sequences by the end of the run, "
        f"{epochs:,.2f} epochs of {source.num_sequences:,}",
    )  # fmt: skip


def _shares(
    group: dict[str, tuple[Source, float | None]], weight_of: Callable[[Source], float | int]
) -> dict[str, int]:
    """Shares of the sequences: by the weights that were given, else by `weight_of`."""
    weights = [weight_of(dataset) if weight is None else weight
               for dataset, weight in group.values()]
    return dict(zip(group, to_shares(weights), strict=True))


def _multitask_weight(config: GLMDatasetConfig, dataset: MultitaskDataset) -> float | int:
    """Sequences in proportion to (capped number of samples) ** (1 / temperature)."""
    size = len(dataset.samples)
    cap = config.multitask_sample_cap
    if config.multitask_temperature == 1 and (cap is None or cap >= size):
        return dataset.num_sequences
    counted = size if cap is None else min(size, cap)
    return counted ** (1 / config.multitask_temperature) * dataset.num_sequences / size


def _sequence_share(
    config: GLMDatasetConfig,
    multitask: dict[str, tuple[Source, float | None]],
    shares: dict[str, int],
) -> Fraction:
    """Share of the sequences that gives prompt/target data its share of the tokens.

    Its sequences are not quite full; those of text are, but for some 0.1%.
    """
    ratio = Fraction(str(config.multitask_ratio))
    if not multitask:
        return Fraction(0)
    fill = sum(
        shares[identity] * Fraction(dataset.num_tokens, dataset.num_sequences)
        for identity, (dataset, _) in multitask.items()
    ) / (sum(shares.values()) * config.sequence_length)
    return ratio / (ratio + (1 - ratio) * fill)


def _build(
    cls: type,
    config: GLMDatasetConfig,
    prefix: str,
    split: Split,
    num_samples: int | None,
) -> Source | None:
    """One split of one prefix by Megatron's builder, which lets rank 0 go first."""
    sizes: list[int | None] = [0, 0, 0]
    sizes[split.value] = num_samples
    if config.blend is not None:
        only = replace(config, blend=([prefix], None))
        only.split_matrix = [
            bounds if other == split else None
            for other, bounds in zip(Split, config.split_matrix, strict=True)
        ]
    else:
        only = replace(
            config,
            blend_per_split=[([prefix], None) if other == split else None for other in Split],
        )
    return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, only).build()[split.value]
