"""The ledger and the mix go through checkpoints: what was read is counted once, and only once."""

import shutil
from pathlib import Path

import pytest

from megatron_glm.checkpoint.megatron import MegatronCheckpoint
from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain

pytestmark = pytest.mark.ranks
STEPS, STOP, GLOBAL_BATCH, SEQUENCE = 6, 3, 8, 128


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two corpora of different documents, and the flags of their common tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    first = make_corpus(folder / "a")
    second = make_corpus(folder / "b", seed=1, tokenizer_model=first.tokenizer_model)
    return first, second


def flags_of(sources, folder, *prefixes):
    return [*TINY, *sources[0].flags, "--data-path", *prefixes, "--train-iters", str(STEPS),
            "--save", str(folder), "--load", str(folder)]  # fmt: skip


def state_of(folder: Path, iteration: int) -> tuple[dict, dict]:
    args = MegatronCheckpoint(folder, iteration).args
    return args.ledger_state, args.mix_state


def samples_and_tokens(ledger: dict) -> tuple[int, int]:
    rows = [row for source in ledger.values() for row in source.values()]
    return sum(row[0] for row in rows), sum(row[1] for row in rows)


@pytest.mark.parametrize("layout", [[], ["--tensor-model-parallel-size", "2"],
                                    ["--pipeline-model-parallel-size", "2"]], ids=" ".join)
def test_the_ledger_of_a_resumed_run_is_that_of_the_whole_one(sources, tmp_path, layout):
    mix = ("3", sources[0].prefix, "1", sources[1].prefix)
    whole, stopped = flags_of(sources, tmp_path / "whole", *mix), flags_of(
        sources, tmp_path / "stopped", *mix)
    pretrain([*whole, *layout], world_size=2)
    pretrain([*stopped, *layout, "--exit-interval", str(STOP)], world_size=2)
    pretrain([*stopped, *layout], world_size=2)
    half, _ = state_of(tmp_path / "stopped", STOP)
    ledger, mix_state = state_of(tmp_path / "stopped", STEPS)
    assert (ledger, mix_state) == state_of(tmp_path / "whole", STEPS)
    for counted, steps in ((half, STOP), (ledger, STEPS)):
        _, tokens = samples_and_tokens(counted)
        read = steps * GLOBAL_BATCH * SEQUENCE
        assert 0.97 * read < tokens <= read
    assert set(ledger) == {source.prefix for source in sources}


def test_another_mix_begins_where_the_checkpoint_stands(sources, tmp_path):
    alone = flags_of(sources, tmp_path, sources[0].prefix)
    pretrain([*alone, "--exit-interval", str(STOP)])
    both = flags_of(sources, tmp_path, "1", sources[0].prefix, "1", sources[1].prefix)
    pretrain(both)
    before, _ = state_of(tmp_path, STOP)
    ledger, mix_state = state_of(tmp_path, STEPS)
    assert set(before) == {sources[0].prefix}
    assert set(ledger) == {source.prefix for source in sources}
    assert mix_state["start"] == STOP * GLOBAL_BATCH
    assert list(mix_state["consumed"].values()) == [STOP * GLOBAL_BATCH]


def test_a_fresh_start_from_weights_forgets_what_was_read(sources, tmp_path):
    first = flags_of(sources, tmp_path / "run", sources[0].prefix)
    pretrain([*first, "--train-iters", "2", "--lr-warmup-iters", "1"])
    shutil.copytree(tmp_path / "run", tmp_path / "weights")
    flags = flags_of(sources, tmp_path / "tuned", sources[0].prefix)
    pretrain([*flags, "--load", str(tmp_path / "weights"), "--finetune"])
    ledger, mix_state = state_of(tmp_path / "tuned", STEPS)
    assert samples_and_tokens(ledger)[1] <= STEPS * GLOBAL_BATCH * SEQUENCE
    assert mix_state["start"] == 0
