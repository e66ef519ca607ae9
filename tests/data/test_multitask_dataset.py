"""Prompt/target samples in packed sequences: every sample once an epoch, no target cut."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import Split

from megatron_glm.data.blank_infilling import Objective
from megatron_glm.data.config import DataError
from megatron_glm.data.multitask_dataset import MultitaskDataset
from megatron_glm.data.packing import best_fit
from tests.data.corpora import (
    TOKENIZER,
    make_config,
    random_prompts,
    write_documents,
    write_prompts,
)
from tests.data.restoring import samples_of


def build(prefix, **fields):
    config = make_config("unused", **{"sequence_length": 512} | fields)
    pair = MultitaskDataset.build_low_level_dataset(prefix, config)
    indices = np.arange(MultitaskDataset.numel_low_level_dataset(pair), dtype=np.int32)
    return MultitaskDataset(pair, prefix, indices, None, Split.train, config)


def pairs_of(dataset, begin, end):
    """Prompt and target of every sample in some sequences, read off the batches."""
    for index in range(begin, end):
        for objective, context_length, tokens, labels, loss_mask, _ in samples_of(dataset[index]):
            assert objective == Objective.MULTITASK
            assert tokens[context_length - 1] == TOKENIZER.mask
            assert tokens[context_length] == TOKENIZER.sop and labels[-1] == TOKENIZER.eop
            assert not loss_mask[:context_length].any() and loss_mask[context_length:].all()
            yield tuple(tokens[: context_length - 1]), tuple(labels[context_length:-1])


def as_counter(samples):
    return Counter((tuple(prompt), tuple(target)) for prompt, target in samples)


@pytest.mark.parametrize("append_eod", [False, True])
def test_every_epoch_has_every_sample_exactly_once(tmp_path, append_eod):
    samples = random_prompts(0, 500)
    end = [TOKENIZER.eod] if append_eod else []
    prefix = write_prompts(
        tmp_path / "qa", [(np.append(p, end), np.append(t, end)) for p, t in samples]
    )
    dataset = build(prefix)
    size = len(dataset)
    for epoch in range(3):
        assert as_counter(pairs_of(dataset, epoch * size, (epoch + 1) * size)) == (
            as_counter(samples)
        )
    orders = [[tuple(dataset[i]["tokens"]) for i in range(e * size, (e + 1) * size)]
              for e in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_sequences_are_nearly_full(tmp_path):
    prefix = write_prompts(tmp_path / "qa", random_prompts(1, 2000))
    dataset = build(prefix, max_samples_per_sequence=64)
    assert dataset.num_tokens / (512 * (len(dataset) - 1)) > 0.99
    used = sum(len(s[2]) for i in range(len(dataset)) for s in samples_of(dataset[i]))
    assert used == dataset.num_tokens


def test_long_prompts_are_cut_and_targets_never(tmp_path, caplog):
    long = np.arange(600)
    prefix = write_prompts(tmp_path / "qa", [(long, long[:400]), (long[:50], long[:510]),
                                             (long[:50], long[:511])])
    dataset = build(prefix)
    assert "1 of 3 samples are left out" in caplog.text and "510 tokens" in caplog.text
    assert as_counter(pairs_of(dataset, 0, len(dataset))) == as_counter(
        [(long[:110], long[:400]), ([], long[:510])]
    )


def test_positions_follow_the_scheme_that_is_asked_for(tmp_path):
    prefix = write_prompts(tmp_path / "qa", [([1, 2, 3], [4, 5])])
    positions = build(prefix)[0]["position_ids"][:7]
    unified = build(prefix, unified_multitask_encoding=True)[0]["position_ids"][:7]
    assert positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert unified.tolist() == [0, 1, 2, 3, 3, 4, 5]


def test_inputs_and_targets_must_match(tmp_path):
    write_documents(tmp_path / "qa_inputs_document", [[1], [2]])
    write_documents(tmp_path / "qa_targets_document", [[1]])
    with pytest.raises(DataError, match="--multitask-data-path .*: 2 inputs and 1 targets"):
        build(str(tmp_path / "qa"))


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(1, 9))
def test_best_fit_packs_everything_within_bounds(lengths, max_samples):
    lengths = np.array(lengths, dtype=np.int64)
    order, ends = best_fit(lengths, 40, max_samples)
    assert sorted(order) == list(range(len(lengths)))
    packs = np.split(order, ends)[:-1] if len(ends) else []
    assert all(0 < len(pack) <= max_samples and lengths[pack].sum() <= 40 for pack in packs)
    # Greedy: no two half-empty sequences could have been one.
    half = [pack for pack in packs if lengths[pack].sum() <= 20 and len(pack) <= max_samples // 2]
    assert len(half) <= 1
