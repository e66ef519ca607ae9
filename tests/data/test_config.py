"""Flags that contradict each other are named with their value, the rule and the cure."""

import pytest

from megatron_glm.data.config import DataError, GLMDataArguments, GLMDatasetConfig, objective_names
from tests.data.corpora import TOKENIZER, make_config


@pytest.mark.parametrize("fields, message", [
    ({"gpt_prob": 1.2}, r"--gpt-prob 1.2: must be between 0 and 1"),
    ({"gpt_prob": 0.8, "sentence_mask_prob": 0.3}, r"--gpt-prob 0.8: with --sentence-mask-prob"),
    ({"mask_prob": 0.0}, r"--mask-prob 0.0: must be above 0"),
    ({"average_block_length": 20.0}, r"--average-block-length 20.0: must be"),
    ({"sequence_length": 63}, r"--seq-length 63: shorter than 4 samples of 16 tokens; give at"),
    ({"max_samples_per_sequence": 4}, r"--max-samples-per-sequence 4: must exceed"),
    ({"multitask_temperature": 0.0}, r"--multitask-temperature 0.0"),
    ({"multitask_ratio": -0.1}, r"--multitask-ratio -0.1"),
    ({"multitask_sample_cap": 0}, r"--multitask-sample-cap 0"),
    ({"aggregated_samples_per_sequence": 0}, r"--aggregated-samples-per-sequence 0"),
])
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        make_config("text", **fields)


def test_missing_data_is_refused():
    with pytest.raises(DataError, match="--data-path is missing"):
        GLMDatasetConfig(random_seed=1, sequence_length=128, tokenizer=TOKENIZER)


@pytest.mark.parametrize("seq_length, rows", [(128, 16), (2048, 64), (8192, 256)])
def test_rows_grow_with_the_sequence(seq_length, rows):
    assert make_config("text", sequence_length=seq_length).max_samples_per_sequence == rows


def test_objectives_of_the_flags():
    assert objective_names(GLMDataArguments()) == {0: "[MASK]", 1: "[gMASK]"}
    assert objective_names(GLMDataArguments(gpt_prob=1.0)) == {1: "[gMASK]"}
    both = GLMDataArguments(gpt_prob=0.0, sentence_mask_prob=1.0, multitask_data_path=["x"])
    assert objective_names(both) == {1: "[gMASK]", 2: "[sMASK]", 3: "multitask"}
