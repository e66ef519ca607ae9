"""A sequence as a person reads it says what the batch says."""

import json

import numpy as np
import pytest

from megatron_glm.data.builder import train_valid_test_datasets
from megatron_glm.data.sample_view import render, view_sequence
from tests.data.corpora import (
    TOKENIZER,
    make_config,
    random_documents,
    random_prompts,
    write_documents,
    write_prompts,
)


class Spelling(type(TOKENIZER)):
    """Spells every id out."""

    def detokenize(self, ids):
        return "".join(f"<{index}>" for index in ids)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = write_documents(folder / "text", random_documents(0, 200, 100))
    prompts = write_prompts(folder / "qa", random_prompts(0, 100))
    config = make_config(text, sequence_length=256, multitask_data_path=[prompts],
                         multitask_ratio=0.3, gpt_prob=0.4, sentence_mask_prob=0.2)
    return train_valid_test_datasets(config, [1000, 0, 0])[0]


def ids(text):
    return [int(piece) for piece in text.strip("<>").split("><") if piece]


def test_contexts_blanks_and_labels_are_those_of_the_batch(train):
    seen = set()
    for index in range(60):
        packed, view = train[index], view_sequence(train, index, Spelling())
        ends = [sample.end for sample in view.samples]
        assert ends == packed["sample_ends"][: len(ends)].tolist()
        assert view.padding == 256 - ends[-1]
        for sample in view.samples:
            seen.add(sample.objective)
            pieces = sample.context.split(" ")
            context = packed["tokens"][sample.begin : sample.context_end].tolist()
            # Each blank stands where its mask is, and all the rest is there in its order.
            blanks = [piece for piece in pieces if piece.startswith("⟦")]
            numbers = range(1, len(sample.fillings) + 1)
            assert sorted(blanks) == sorted(f"⟦{number}⟧" for number in numbers)
            shown = [x for piece in pieces for x in ([None] if "⟦" in piece else ids(piece))]
            masks = (TOKENIZER.mask, TOKENIZER.gmask, TOKENIZER.smask)
            assert shown == [None if token in masks else token for token in context]
            places = []
            for filling in sample.fillings:
                part = slice(filling.begin, filling.end)
                places += range(filling.begin, filling.end)
                assert ids(filling.text) == packed["labels"][part].tolist()
                assert filling.loss_weight == filling.end - filling.begin
                positions = packed["position_ids"][part]
                assert (filling.first_position, filling.last_position) == (
                    positions[0], positions[-1])
            assert places == list(range(sample.context_end, sample.end))
    assert seen == {"[MASK]", "[gMASK]", "[sMASK]", "multitask"}


def test_documents_of_a_sample_hold_its_text(train):
    dataset = next(iter(train.sources.values())).dataset
    for index in range(30):
        view = view_sequence(train, index, TOKENIZER)
        if view.samples[0].objective != "[gMASK]":
            continue
        (sample,) = view.samples if len(view.samples) == 1 else view.samples[:1]
        text = np.concatenate([dataset[d][first:last] for d, first, last in sample.documents])
        packed = train[index]
        context = packed["tokens"][sample.begin : sample.context_end - 1]
        np.testing.assert_array_equal(sorted(text), sorted(
            [*context, *packed["labels"][sample.context_end : sample.end]]))


def test_views_are_text_and_json(train):
    view = view_sequence(train, 3, TOKENIZER)
    text = render(view)
    assert text.startswith("sequence 3: sequence ") and "each sees" in text
    assert json.loads(json.dumps(view.as_dict()))["samples"][0]["begin"] == 0
