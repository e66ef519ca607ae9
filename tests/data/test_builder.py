"""Splits, blends and the share of prompt/target data, through Megatron's builder."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_glm.data.blank_infilling import Objective
from megatron_glm.data.builder import train_valid_test_datasets
from megatron_glm.data.config import DataError, source_names
from tests.data.corpora import (
    make_config,
    random_documents,
    random_prompts,
    write_documents,
    write_prompts,
)
from tests.ranks import run_ranks

ALWAYS = [1000, 50, 50]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for seed, name in enumerate(("web", "books")):
        write_documents(folder / name, random_documents(seed, 400 * (seed + 1), 120))
    for seed, name in enumerate(("qa", "sums")):
        write_prompts(folder / name, random_prompts(seed, 500 * (3 - seed)))
    return folder


def build(config, num_samples=ALWAYS):
    return train_valid_test_datasets(config, num_samples)


def counts(dataset, size):
    """Sequences of each source number."""
    return Counter(int(dataset[index]["sources"][0]) for index in range(size))


def documents_of(dataset):
    return {source.dataset_path: set(source.indices.tolist())
            for source in dataset.sources.values()}


def test_splits_divide_the_documents(corpora):
    config = make_config(corpora / "web", split="80,15,5", sequence_length=256)
    splits = build(config)
    parts = [next(iter(documents_of(dataset).values())) for dataset in splits]
    assert [len(part) for part in parts] == [320, 60, 20]
    assert len(set.union(*parts)) == 400
    assert [len(dataset) for dataset in splits] == ALWAYS


def test_weights_are_shares_of_the_sequences(corpora):
    config = make_config(corpora / "web", corpora / "books", weights=[0.3, 0.7],
                         sequence_length=256)
    train, _, _ = build(config)
    assert counts(train, 500) == {0: 150, 1: 350}
    assert source_names(config) == ["web", "books"]


def test_without_weights_sources_count_by_their_size(corpora):
    config = make_config(corpora / "web", corpora / "books", sequence_length=256)
    train, _, _ = build(config)
    web, books = (source.num_sequences for source in train.sources.values())
    assert counts(train, web + books) == {0: web, 1: books}


def test_one_epoch_of_validation_reads_every_sequence_once(corpora):
    config = make_config(corpora / "web", corpora / "books", split="50,50,0", sequence_length=256,
                         multitask_data_path=[str(corpora / "qa")])
    _, valid, _ = build(config, [10, None, 0])
    size = sum(source.num_sequences for source in valid.sources.values())
    assert len(valid) == size and len(valid.sources) == 3
    assert valid.mix.counts(size) == {
        identity: source.num_sequences for identity, source in valid.sources.items()
    }


def test_a_path_for_each_split(corpora):
    config = make_config(corpora, blend=None, split=None, sequence_length=256, blend_per_split=[
        ([str(corpora / "web"), str(corpora / "books")], [1.0, 1.0]),
        ([str(corpora / "books")], None), None,
    ], multitask_data_path=[str(corpora / "qa")])
    train, valid, test = build(config)
    assert {0, 1, 2} == set(counts(train, 300)) and counts(valid, 30) == {1: 30} and test is None


@pytest.mark.parametrize("ratio", [0.05, 0.4])
def test_prompts_and_targets_have_their_share_of_the_tokens(corpora, ratio):
    config = make_config(
        corpora / "web", sequence_length=512, multitask_ratio=ratio,
        multitask_data_path=[str(corpora / "qa"), str(corpora / "sums")],
    )
    train, _, _ = build(config)
    tokens = Counter()
    for index in range(2000):
        item = train[index]
        lengths = np.diff(item["sample_ends"], prepend=0)
        for objective, length in zip(item["objectives"], lengths, strict=True):
            tokens[int(objective)] += int(length)
    tokens.pop(-1, None)
    assert tokens[Objective.MULTITASK] / sum(tokens.values()) == pytest.approx(ratio, rel=0.03)


def test_the_share_of_prompts_and_targets_ramps_in_training_only(corpora):
    config = make_config(
        corpora / "web", split="50,50,0", sequence_length=256, multitask_ratio=0.5,
        multitask_ramp_samples=400, multitask_data_path=[str(corpora / "qa")],
    )
    train, valid, _ = build(config)
    halves = [sum(int(train[i]["sources"][0] == 1) for i in part)
              for part in (range(200), range(200, 400))]
    assert halves[0] == pytest.approx(25, abs=3) and halves[1] == pytest.approx(75, abs=5)
    assert counts(valid, 40)[1] == pytest.approx(20, abs=2)


def share_of(corpora, **fields):
    config = make_config(
        corpora / "web", sequence_length=512, multitask_ratio=0.5,
        multitask_data_path=[str(corpora / "qa"), str(corpora / "sums")], **fields,
    )
    train, _, _ = build(config)
    return {
        source.dataset_path.rsplit("/")[-1]: train.mix.multitask.get(identity, 0)
        * len(getattr(source, "samples", [])) / source.num_sequences
        for identity, source in train.sources.items()
    }


def test_sources_weigh_by_capped_size_and_temperature(corpora):
    """Samples drawn of each source: in proportion to min(size, cap) ** (1 / temperature)."""
    sizes = share_of(corpora)
    assert sizes["qa"] / sizes["sums"] == pytest.approx(1500 / 1000)
    capped = share_of(corpora, multitask_sample_cap=750)
    assert capped["qa"] / capped["sums"] == pytest.approx(1)
    warm = share_of(corpora, multitask_temperature=2.0)
    assert warm["qa"] / warm["sums"] == pytest.approx(1.5**0.5)


def test_weights_of_prompt_sources_may_be_given(corpora):
    config = make_config(
        corpora / "web", sequence_length=512, multitask_ratio=1.0,
        multitask_data_path=["1", str(corpora / "qa"), "3", str(corpora / "sums")],
    )
    train, _, _ = build(config)
    assert counts(train, 80) == {1: 20, 2: 60}


def test_a_changed_mix_goes_on_behind_what_was_read(corpora, caplog):
    """The batches themselves: two runs with other weights read no sequence twice."""
    def sequences(train, start, stop):
        return {(int(item["sources"][0]), item["tokens"].tobytes())
                for item in (train[index] for index in range(start, stop))}

    path = [str(corpora / "qa")]
    config = make_config(corpora / "web", corpora / "books", weights=[1, 1], sequence_length=256,
                         multitask_data_path=path, multitask_ratio=0.2)
    first, _, _ = build(config)
    state = json.loads(json.dumps(first.mix.state_dict()))
    changed = replace(config, blend=(config.blend[0], [1, 5]), multitask_ratio=0.5,
                      consumed_train_samples=150, mix_state=state)
    second, _, _ = build(changed)
    assert "from sequence 150 on: other shares of the same sources" in caplog.text
    caplog.clear()
    one, other = sequences(first, 0, 150), sequences(second, 150, 400)
    assert len(one) == 150 and len(other) == 250 and not one & other
    same = replace(config, consumed_train_samples=150, mix_state=state)
    assert sequences(build(same)[0], 150, 300) == sequences(first, 150, 300)
    assert "the mix of data" not in caplog.text


def test_the_log_says_how_often_a_run_reads_each_source(corpora, caplog):
    caplog.set_level("INFO")
    train, _, _ = build(
        make_config(corpora / "web", corpora / "books", weights=[1, 3], sequence_length=256)
    )
    for name, count in (("web", 250), ("books", 750)):
        epoch = next(s.num_sequences for s in train.sources.values() if name in s.dataset_path)
        expected = f"{corpora / name}: {count} sequences by the end of the run, "
        assert f"{expected}{count / epoch:,.2f} epochs of {epoch:,}" in caplog.text


def build_on_rank(prefix):
    config = make_config(prefix, split="80,15,5", sequence_length=256)
    return [int(dataset[3]["tokens"].sum()) for dataset in build(config)]


@pytest.mark.ranks
def test_all_ranks_have_the_same_data(corpora):
    prefix = str(corpora / "web")
    results = run_ranks(build_on_rank, prefix, world_size=3)
    alone = build(make_config(prefix, split="80,15,5", sequence_length=256))
    expected = [int(dataset[3]["tokens"].sum()) for dataset in alone]
    assert results == [expected] * 3


def test_items_collate_to_the_batch_that_training_takes(corpora):
    config = make_config(corpora / "web", sequence_length=256)
    train, _, _ = build(config)
    batch = next(iter(torch.utils.data.DataLoader(train, batch_size=3)))
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == {
        **{name: ((3, 256), torch.int64) for name in ("tokens", "labels", "position_ids")},
        "loss_mask": ((3, 256), torch.float32),
        **{name: ((3, 16), torch.int64)
           for name in ("context_lengths", "sample_ends", "objectives", "sources")},
    }


def test_a_split_without_data_is_named(corpora, caplog):
    config = make_config(corpora / "web", split="0,100,0", sequence_length=256)
    assert build(config)[0] is None
    config = make_config(corpora / "web", split="1,1,1", sequence_length=256)
    few = write_documents(corpora / "few", [[1, 2, 3]])
    config = replace(config, blend=([few], None), split="10,10,1")
    with pytest.raises(DataError, match="few: --split leaves no data to the train split"):
        build(config)
    assert build(replace(config, split="98,1,1"))[1:] == (None, None)
    assert "leaves no data to the valid split" in caplog.text


def test_the_same_content_twice_is_refused(corpora):
    config = make_config(corpora / "web", corpora / "web", weights=[1, 1], sequence_length=256)
    with pytest.raises(DataError, match="web: given twice"):
        build(config)
