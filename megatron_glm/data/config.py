"""What the data side is told: the flags, and Megatron's dataset config with them in it."""

import os
from argparse import Namespace
from dataclasses import dataclass, field, fields
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.utils import Split, get_blend_from_list

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES, Objective
from megatron_glm.errors import GLMError, flag_of

# Rows of samples for each token of a sequence, unless --max-samples-per-sequence says otherwise.
_TOKENS_PER_ROW = 32
_LEAST_ROWS = 16
# Below this a [MASK] sample holds less than a span with its surroundings.
LEAST_SAMPLE_LENGTH = 16

# Flags, by the names of their values, that decide which text a sequence of a run is, beside --seed:
# what index 7 means under one value, no index means under another.
CUTTING_FLAGS = (
    "seq_length", "split", "gpt_prob", "mask_prob", "average_block_length", "short_seq_prob",
    "single_span_prob", "sentence_mask_prob", "aggregated_samples_per_sequence",
    "max_samples_per_sequence", "reset_attention_mask",
)  # fmt: skip


class DataError(GLMError):
    """Flags or files of the data side that cannot be used."""


@dataclass
class GLMDataArguments:
    """What the objective and the mix of data are."""

    gpt_prob: float = 0.7
    """Share of text sequences that are [gMASK] samples: a context, then the rest of the text,
    between 0 and 1."""

    mask_prob: float = 0.15
    """Share of the tokens of a [MASK] or [sMASK] sample that blanks hide, between 0 and 0.5."""

    average_block_length: float = 3.0
    """Mean of the Poisson distribution of span lengths in [MASK] samples, in tokens."""

    min_gmask_ratio: float = 0.2
    """Least share of a [gMASK] sample that is generated; the share is uniform between it and 1."""

    short_seq_prob: float = 0.02
    """Share of text sequences that are cut into shorter samples, of 32 tokens or more."""

    single_span_prob: float = 0.02
    """Share of [MASK] sequences whose samples have a single span each."""

    sentence_mask_prob: float = 0.0
    """Share of text sequences that are [sMASK] samples, with whole sentences as spans. A sample
    without a whole sentence becomes a [gMASK] sample."""

    aggregated_samples_per_sequence: int = 4
    """Number of [MASK] or [sMASK] samples that share a sequence."""

    max_samples_per_sequence: int | None = None
    """Most samples that a sequence can hold, padding included. Default: 1 for every 32 tokens of
    the sequence length, 16 at least."""

    multitask_data_path: list[str] | None = None
    """Prompt/target data, as prefixes or as weights and prefixes like --data-path. PREFIX stands
    for PREFIX_inputs_document and PREFIX_targets_document, which tools/preprocess_data.py writes
    with --json-keys inputs targets."""

    multitask_ratio: float = 0.05
    """Share of the tokens of a run that are prompt/target samples, between 0 and 1; only where
    --multitask-data-path is given."""

    multitask_ramp_samples: int = 0
    """Number of sequences over which the share of prompt/target data goes linearly from its last
    value (0 at the start of a run) to --multitask-ratio."""

    multitask_sample_cap: int | None = None
    """Most samples that a source of prompt/target data counts for when sources are weighed.
    Without effect on weights given in --multitask-data-path. Default: no cap."""

    multitask_temperature: float = 1.0
    """Sources of prompt/target data are weighed by (capped) number of samples to the power of one
    over this. Without effect on weights given in --multitask-data-path."""

    unified_multitask_encoding: bool = False
    """Positions of a prompt/target sample's target run on from that of its [MASK], instead of from
    the end of the prompt. Stored with checkpoints."""


@dataclass
class GLMDatasetConfig(GLMDataArguments, BlendedMegatronDatasetConfig):
    """Megatron's dataset config with GLM's fields.

    Raises DataError, naming flag, value and rule, where the fields contradict each other.
    """

    reset_attention_mask: bool = False
    """Whether documents are kept from seeing each other: each part of one becomes a sample."""

    consumed_train_samples: int = 0
    """Number of sequences that the run has trained on already."""

    mix_state: dict | None = field(default=None, repr=False)
    """Where the mix of sources stands, from the checkpoint that the run goes on from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_samples_per_sequence is None:
            self.max_samples_per_sequence = default_max_samples(self.sequence_length)
        if self.tokenizer is None:
            raise DataError("the dataset config has no tokenizer: build one, and pass it on")
        if self.mock:
            raise DataError(
                "--data-path is missing (or --train-data-path and its kin): give the prefix that "
                "tools/preprocess_data.py wrote, without .bin"
            )
        self._check_ranges()

    def _check_ranges(self) -> None:
        def check(name: str, is_right: bool, rule: str) -> None:
            if not is_right:
                raise DataError(f"{flag_of(name)} {getattr(self, name)}: {rule}")

        for name in ("gpt_prob", "sentence_mask_prob", "short_seq_prob", "single_span_prob",
                     "min_gmask_ratio", "multitask_ratio"):
            check(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        check("gpt_prob", self.gpt_prob + self.sentence_mask_prob <= 1 + 1e-9,
              f"with --sentence-mask-prob {self.sentence_mask_prob} it exceeds 1; lower one")
        check("mask_prob", 0 < self.mask_prob <= 0.5, "must be above 0 and at most 0.5")
        check("average_block_length", 0 < self.average_block_length <= 10,
              "must be above 0 and at most 10 tokens")
        least = LEAST_SAMPLE_LENGTH * self.aggregated_samples_per_sequence
        check("aggregated_samples_per_sequence", self.aggregated_samples_per_sequence >= 1,
              "must be 1 or more")
        if self.sequence_length < least:
            raise DataError(
                f"--seq-length {self.sequence_length}: shorter than "
                f"{self.aggregated_samples_per_sequence} samples of {LEAST_SAMPLE_LENGTH} tokens; "
                f"give at least {least}, or lower --aggregated-samples-per-sequence"
            )
        check("max_samples_per_sequence",
              self.max_samples_per_sequence > self.aggregated_samples_per_sequence,
              "must exceed --aggregated-samples-per-sequence "
              f"{self.aggregated_samples_per_sequence}")
        check("multitask_ramp_samples", self.multitask_ramp_samples >= 0, "must be 0 or more")
        check("multitask_temperature", self.multitask_temperature > 0, "must be above 0")
        check("multitask_sample_cap", self.multitask_sample_cap is None
              or self.multitask_sample_cap > 0, "must be 1 or more")


def default_max_samples(seq_length: int) -> int:
    return max(_LEAST_ROWS, seq_length // _TOKENS_PER_ROW)


def dataset_config_from_args(args: Namespace, tokenizer: Any) -> GLMDatasetConfig:
    """The dataset config of parsed flags. Fills in what follows from others:
    `args.max_samples_per_sequence` where not given, `args.source_prefixes`, and the names of
    `args.train_sources` and `args.eval_sources` by their number in a batch."""
    # Only entry points have flags, and they have imported Megatron's trainer, which takes seconds.
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GLMDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        tokenizer=tokenizer,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split if blend is not None else None,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        reset_attention_mask=args.reset_attention_mask,
        # Set in training: by Megatron's check of the flags, and from a checkpoint.
        consumed_train_samples=getattr(args, "consumed_train_samples", 0),
        mix_state=getattr(args, "mix_state", None),
        **{item.name: getattr(args, item.name) for item in fields(GLMDataArguments)},
    )
    args.max_samples_per_sequence = config.max_samples_per_sequence
    args.source_prefixes = source_prefixes(config)
    args.train_sources = split_sources(config, Split.train)
    args.eval_sources = split_sources(config, Split.valid) | split_sources(config, Split.test)
    return config


def source_prefixes(config: GLMDatasetConfig) -> list[str]:
    """The prefixes that a run reads, in the order of their numbers in a batch (`sources`)."""
    splits = [prefix for split in Split for prefix in _prefixes_of(config, split)]
    return list(dict.fromkeys(splits))


def split_sources(config: GLMDatasetConfig, split: Split) -> dict[int, str]:
    """The sources that a split reads: number in a batch -> name in a log."""
    names = dict(zip(source_prefixes(config), source_names(config), strict=True))
    own = _prefixes_of(config, split)
    return {number: name for number, (prefix, name) in enumerate(names.items()) if prefix in own}


def _prefixes_of(config: GLMDatasetConfig, split: Split) -> list[str]:
    blend = config.blend if config.blend is not None else config.blend_per_split[split.value]
    multitask = multitask_blend(config, split)
    return [prefix for part in (blend, multitask) if part is not None for prefix in part[0]]


def multitask_blend(config: GLMDatasetConfig, split: Split) -> tuple | None:
    """Prefixes and weights of the prompt/target data of a split.

    Without --split nothing divides it, and all of it is for training.
    """
    if config.multitask_ratio > 0 and (config.blend is not None or split == Split.train):
        return get_blend_from_list(config.multitask_data_path)
    return None


def source_names(config: GLMDatasetConfig) -> list[str]:
    """What the sources are called in logs: file names, or whole prefixes where those coincide."""
    prefixes = source_prefixes(config)
    names = [os.path.basename(prefix) for prefix in prefixes]
    return names if len(set(names)) == len(names) else prefixes


def objective_names(args: Namespace | GLMDataArguments) -> dict[int, str]:
    """The objectives that these flags give samples of: value in a batch -> name in a log."""
    probabilities = {
        Objective.MASK: 1 - args.gpt_prob - args.sentence_mask_prob,
        Objective.GMASK: args.gpt_prob + args.sentence_mask_prob,
        Objective.SMASK: args.sentence_mask_prob,
        Objective.MULTITASK: args.multitask_ratio if args.multitask_data_path else 0,
    }
    return {
        int(objective): OBJECTIVE_NAMES[objective]
        for objective, probability in probabilities.items()
        if probability > 1e-9
    }
