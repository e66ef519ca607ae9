"""Text as packed sequences: nothing lost, nothing cut, nothing but a function of the index."""

import pickle
import struct
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_glm.data.blank_infilling import Objective
from megatron_glm.data.config import DataError
from megatron_glm.data.corruption import Corruption
from megatron_glm.data.glm_dataset import GLMDataset
from megatron_glm.data.packing import pack_samples
from megatron_glm.data.randomness import random_stream
from megatron_glm.data.sequence_kinds import sequence_kinds
from tests.data.corpora import TOKENIZER, make_config, random_documents, write_documents
from tests.data.restoring import samples_of, text_of


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("text") / "text", random_documents(0, 900, 300))


def build(prefix, num_samples=None, **fields):
    config = make_config(prefix, **fields)
    low_level = GLMDataset.build_low_level_dataset(prefix, config)
    documents = np.arange(GLMDataset.numel_low_level_dataset(low_level), dtype=np.int32)
    return GLMDataset(low_level, prefix, documents, num_samples, Split.train, config)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("fields", [
    {}, {"reset_attention_mask": True}, {"sentence_mask_prob": 0.3}, {"gpt_prob": 0.0},
    {"short_seq_prob": 1.0}, {"single_span_prob": 1.0, "gpt_prob": 0.0},
    {"sequence_length": 128},
])
def test_an_epoch_has_every_token_exactly_once(prefix, fields):
    """The text is read back from the batches alone and compared with the files."""
    dataset = build(prefix, **fields)
    file = IndexedDataset(prefix)
    seen = np.zeros(sum(file.sequence_lengths), dtype=int)
    begins = np.cumsum(file.sequence_lengths) - file.sequence_lengths
    for index in range(len(dataset)):
        _, passage, parts = dataset.draw(index)
        text = np.full(len(passage.ids), -1)
        for (part, _), sample in zip(parts, samples_of(dataset[index]), strict=True):
            text[part.places], _ = text_of(*sample)
        np.testing.assert_array_equal(text, passage.ids)
        stops = np.append(passage.starts[1:], len(text))
        for document, start, stop, offset in zip(
            passage.documents, passage.starts, stops, passage.offsets, strict=True
        ):
            np.testing.assert_array_equal(
                text[start:stop], file[int(document)][offset : offset + stop - start]
            )
            seen[begins[document] + offset :][: stop - start] += 1
    assert (seen == 1).all()


def test_statistics_are_those_of_the_paper(prefix):
    """Table 11's settings: shares of the objectives, masked and generated shares, padding."""
    dataset = build(prefix, single_span_prob=0.0, short_seq_prob=0.0)
    masked, generated, sequences = [], [], []
    padding = count = 0
    for index in range(4 * len(dataset)):
        packed = dataset[index]
        samples = list(samples_of(packed))
        sequences.append(samples[0][0])
        used = sum(len(sample[2]) for sample in samples)
        count += 1
        padding += len(packed["tokens"]) - used
        if used + 32 < len(packed["tokens"]):
            continue  # the end of an epoch
        for sample in samples:
            text, num_targets = text_of(*sample)
            (masked if sample[0] == Objective.MASK else generated).append(num_targets / len(text))
        if samples[0][0] == Objective.MASK:
            assert [len(sample[2]) for sample in samples] == [512] * 4
    assert np.mean(np.equal(sequences, Objective.GMASK)) == pytest.approx(0.7, abs=0.01)
    assert np.mean(masked) == pytest.approx(0.153, abs=4 * np.std(masked) / len(masked) ** 0.5)
    assert np.mean(generated) == pytest.approx(0.6, abs=4 * 0.231 / len(generated) ** 0.5)
    assert min(generated) >= 0.2 and max(generated) <= 1
    # What is left at the end of an epoch is one sequence of some hundred.
    assert padding / (count * 2048) < 0.005


def test_padding_stays_below_one_percent_for_every_objective(prefix):
    for fields in ({"gpt_prob": 1.0}, {"gpt_prob": 0.0}, {"gpt_prob": 0, "sentence_mask_prob": 1.0},
                   {"reset_attention_mask": True}, {"reset_attention_mask": True, "gpt_prob": 0.0}):
        dataset = build(prefix, **fields)
        sequences = [dataset[index] for index in range(len(dataset))]
        used = [sum(len(sample[2]) for sample in samples_of(packed)) for packed in sequences]
        # Without the one sequence that ends the epoch.
        assert 1 - np.sort(used)[1:].mean() / 2048 < 0.01, fields


def test_sequences_are_functions_of_seed_epoch_and_index_alone(prefix):
    dataset = build(prefix)
    indices = [5, 0, 3 * len(dataset) + 1, 5, len(dataset) - 1, 10**9]
    first = {index: dataset[index] for index in indices}
    fresh = pickle.loads(pickle.dumps(build(prefix)))
    for index in reversed(indices):
        assert equal(fresh[index], first[index])
    assert not equal(first[5], build(prefix, random_seed=1)[5])
    assert not equal(first[5], dataset[5 + len(dataset)])


def test_loader_workers_change_nothing(prefix):
    dataset = build(prefix, num_samples=24)
    alone, workers = (
        [batch["tokens"] for batch in torch.utils.data.DataLoader(dataset, 4, num_workers=count)]
        for count in (0, 2)
    )
    for one, other in zip(alone, workers, strict=True):
        assert torch.equal(one, other)


def test_documents_come_in_another_order_every_epoch(prefix):
    stream = build(prefix).stream
    orders = [stream.order(epoch)[0].tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(900)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != list(range(900))
    assert np.mean(np.equal(orders[0], orders[1])) < 0.02


def test_documents_are_kept_apart_where_asked(prefix):
    dataset = build(prefix, reset_attention_mask=True)
    for index in range(40):
        _, passage, parts = dataset.draw(index)
        owner = np.repeat(passage.documents, np.diff(np.append(passage.starts, len(passage.ids))))
        for part, _ in parts:
            assert len(set(owner[part.places])) == 1


def test_documents_too_many_for_the_rows_still_fit(tmp_path):
    """Beyond the rows of a sequence, the shortest pieces go without targets, all tokens kept."""
    prefix = write_documents(tmp_path / "tiny", random_documents(1, 900, 8))
    dataset = build(prefix, reset_attention_mask=True)
    packed = dataset[0]
    assert packed["sample_ends"].shape == (64,) and packed["loss_mask"].any()


def test_no_span_covers_an_end_of_document(prefix):
    dataset = build(prefix, gpt_prob=0.0)
    for index in range(30):
        for sample in samples_of(dataset[index]):
            context, labels = sample[2][: sample[1]], sample[3][sample[1] :]
            assert TOKENIZER.eod not in labels
            assert (context == TOKENIZER.mask).sum() == (labels == TOKENIZER.eop).sum() > 0


def test_sentences_are_hidden_whole_where_there_are_any(prefix):
    dataset = build(prefix, gpt_prob=0.0, sentence_mask_prob=1.0, short_seq_prob=0.0)
    ratios = []
    for index in range(30):
        for sample in samples_of(dataset[index]):
            assert sample[0] == Objective.SMASK
            pieces = np.split(sample[3][sample[1] :],
                              np.flatnonzero(sample[3][sample[1] :] == TOKENIZER.eop) + 1)[:-1]
            assert all(piece[-2] % 10 == 0 for piece in pieces)
            text, num_targets = text_of(*sample)
            ratios.append(num_targets / len(text))
    # Short only where documents are so short that three spans cannot cover the share.
    assert np.mean(np.array(ratios) >= 0.15) > 0.95 and 0.15 < np.mean(ratios) < 0.2


def test_without_sentences_the_objective_is_gmask(tmp_path):
    prefix = write_documents(tmp_path / "text", [np.full(3000, 7)] * 5)
    dataset = build(prefix, gpt_prob=0.0, sentence_mask_prob=1.0)
    assert set(dataset[0]["objectives"]) == {Objective.GMASK, -1}


@settings(max_examples=150)
@given(st.data())
def test_any_settings_fit_and_keep_every_token(data):
    """Hypothesis chooses settings, text, documents and a kind; the batch must hold it all."""
    draw = data.draw
    group = draw(st.integers(1, 4))
    length = draw(st.integers(16 * group, 300))
    probability = st.floats(0, 1).map(lambda value: round(value, 3))
    gpt_prob = draw(probability)
    config = make_config(
        "x", sequence_length=length, aggregated_samples_per_sequence=group, gpt_prob=gpt_prob,
        sentence_mask_prob=round(min(1 - gpt_prob, draw(probability)), 3),
        short_seq_prob=draw(probability), single_span_prob=draw(probability),
        min_gmask_ratio=draw(probability), mask_prob=draw(st.sampled_from([0.05, 0.15, 0.3])),
        reset_attention_mask=draw(st.booleans()),
    )
    rng = random_stream(draw(st.integers(0, 10**6)), 0, 0, 0)
    kind = draw(st.sampled_from(sequence_kinds(config, draw(st.integers(1, 400)))))
    size = draw(st.one_of(st.just(kind.num_tokens), st.integers(1, kind.num_tokens)))
    ids = rng.randint(0, 1000, size)
    ends = np.array(sorted(draw(st.sets(st.integers(0, size - 1), max_size=40))), dtype=int)
    ids[ends] = TOKENIZER.eod
    starts = np.unique(np.append(0, ends[ends < size - 1] + 1))

    corrupted = Corruption(config)(rng, kind, ids, starts)
    packed = pack_samples(
        [sample for _, sample in corrupted], 0, length, config.max_samples_per_sequence, 1006
    )
    text = np.full(size, -1)
    for (part, _), sample in zip(corrupted, samples_of(packed), strict=True):
        assert (text[part.places] == -1).all()
        text[part.places], _ = text_of(*sample)
    np.testing.assert_array_equal(text, ids)
    if not config.reset_attention_mask and len(ends) < size:
        assert packed["loss_mask"].any()


def sparse_corpus(prefix, num_documents, length):
    """A corpus of zeros that takes no room on disk."""
    lengths = np.full(num_documents, length, dtype=np.int32)
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, num_documents,
                                                      num_documents + 1))
        stream.write(lengths.tobytes())
        stream.write((np.arange(num_documents, dtype=np.int64) * length * 2).tobytes())
        stream.write(np.arange(num_documents + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(num_documents * length * 2)
    return str(prefix)


def test_a_corpus_of_more_than_2_to_the_31_tokens(tmp_path):
    prefix = sparse_corpus(tmp_path / "large", 5000, 1_000_000)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(2 * (4999 * 1_000_000 + 999_999))
        stream.write(np.uint16(777).tobytes())
    dataset = build(prefix)
    assert dataset.stream.num_tokens == 5_000_000_000 > 2 * 2**31
    order, ends = dataset.stream.order(0)
    last = int(np.flatnonzero(order == 4999)[0])
    passage = dataset.stream.read(0, int(ends[last]) - 10, 10)
    assert passage.ids[-1] == 777 and passage.documents[-1] == 4999
    assert passage.offsets[-1] == 999_990
    kind, begin, count = dataset.epoch.locate(len(dataset) - 1)
    assert begin + count == 5_000_000_000
    assert dataset[len(dataset) - 1]["tokens"].shape == (2048,)


def test_sample_one_thousand_million_after_a_restart_takes_seconds(tmp_path):
    prefix = sparse_corpus(tmp_path / "large", 2_200_000, 1000)
    begin = time.perf_counter()
    dataset = build(prefix, num_samples=2 * 10**9)
    dataset[10**9]
    assert time.perf_counter() - begin < 10


def test_orders_of_many_documents_are_kept_on_disk(tmp_path, monkeypatch):
    prefix = sparse_corpus(tmp_path / "many", 1_100_000, 3)
    first = build(prefix, path_to_cache=str(tmp_path / "cache"))
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(files) == 2 and all(name.startswith("glm-order-") for name in files)
    monkeypatch.setattr(type(first.stream), "_make_order", None)
    again = build(prefix, path_to_cache=str(tmp_path / "cache"))
    assert equal(first[7], again[7])
    (tmp_path / "cache" / files[0]).write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="damaged .* delete glm-order"):
        build(prefix, path_to_cache=str(tmp_path / "cache"))


def test_documents_of_several_sequences_stay_whole(tmp_path):
    """Data split into sentences: a document is what is shuffled, not its sentences."""
    builder = IndexedDatasetBuilder(f"{tmp_path / 'split'}.bin", dtype=np.uint16)
    documents = [[10 * d + s for s in range(3) for _ in range(s + 1)] for d in range(40)]
    for document in documents:
        builder.add_document(np.array(document, dtype=np.uint16), [1, 2, 3])
    builder.finalize(f"{tmp_path / 'split'}.idx")
    stream = build(str(tmp_path / "split"), sequence_length=64).stream
    passage = stream.read(0, 0, stream.num_tokens)
    for document, start in zip(passage.documents, passage.starts, strict=True):
        assert passage.ids[start : start + 6].tolist() == documents[document]
