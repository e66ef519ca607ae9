"""Statistics of sequences against a count over the batches."""

import json

import numpy as np
import pytest

from megatron_glm.data.builder import train_valid_test_datasets
from megatron_glm.data.statistics import measure
from tests.data.corpora import (
    TOKENIZER,
    make_config,
    random_documents,
    random_prompts,
    write_documents,
    write_prompts,
)
from tests.data.restoring import samples_of, text_of


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = write_documents(folder / "text", random_documents(0, 300, 400))
    prompts = write_prompts(folder / "qa", random_prompts(0, 400))
    config = make_config(text, multitask_data_path=[prompts], multitask_ratio=0.1)
    return train_valid_test_datasets(config, [1000, 0, 0])[0]


def test_statistics_are_those_of_the_batches(train):
    found = measure(train, range(60))
    assert json.loads(json.dumps(found)) == found
    masked, lengths, padding, targets = [], [], 0, 0
    for index in range(60):
        packed = train[index]
        used = 0
        for sample in samples_of(packed):
            used += len(sample[2])
            if sample[0] == 0:
                text, num_targets = text_of(*sample)
                masked.append(num_targets / len(text))
                pieces = np.split(sample[3], np.flatnonzero(sample[3] == TOKENIZER.eop) + 1)[:-1]
                pieces[0] = pieces[0][sample[1]:]
                lengths += [len(piece) - 1 for piece in pieces]
        padding += 2048 - used
        targets += int(packed["loss_mask"].sum())
    assert found["masked_share"] == pytest.approx(np.mean(masked))
    assert found["span_length_mean"] == pytest.approx(np.mean(lengths))
    assert sum(found["span_length_histogram"].values()) == pytest.approx(1)
    assert found["padding_share"] == pytest.approx(padding / (60 * 2048))
    assert found["targets_kept"] == found["targets_expected"] == targets
    assert found["targets_lost"] == 0
    assert sum(found["tokens_per_source"].values()) == 60 * 2048 - padding
    assert sum(found["sequences"].values()) == 60


def test_lost_targets_would_be_seen(train, monkeypatch):
    """The count of what was expected does not come from the loss mask."""
    from megatron_glm.data import glm_dataset

    pack = glm_dataset.pack_samples

    def lossy(*args):
        packed = pack(*args)
        packed["loss_mask"][-100:] = 0
        return packed

    before = measure(train, range(5))
    monkeypatch.setattr(glm_dataset, "pack_samples", lossy)
    after = measure(train, range(5))
    assert after["targets_expected"] == before["targets_expected"]
    assert after["targets_lost"] > 0
