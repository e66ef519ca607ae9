"""Ranks that share a model and read other data end the run before it is saved."""

import pytest
import torch
from megatron.core import parallel_state

from megatron_glm.training.agreement import DisagreementError, ReadData
from tests.ranks import run_ranks
from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain_on_this_rank


def compare(differing_rank: int | None) -> str:
    rank, read = torch.distributed.get_rank(), ReadData()
    for number in range(3):
        read.add(torch.full((2, 5), number + (rank == differing_rank and number == 1)))
    try:
        read.compare(7, parallel_state.get_model_parallel_group(), torch.device("cpu"))
    except DisagreementError as error:
        return str(error)
    return ""


@pytest.mark.ranks
def test_the_rank_that_read_other_data_is_named_on_every_rank():
    sizes = dict(world_size=3, pipeline_model_parallel_size=3)
    assert run_ranks(compare, None, **sizes) == [""] * 3
    messages = run_ranks(compare, 1, **sizes)
    assert len(set(messages)) == 1
    assert messages[0].startswith("iteration 7: rank 1 read other data than the other ranks")


def train_on_other_data(flags: list[str]) -> str:
    import pretrain_glm

    if torch.distributed.is_initialized():
        raise AssertionError
    next_batch = pretrain_glm.next_batch

    def next_batch_of_another_loader(data_iterator, **options):
        if torch.distributed.get_rank() == 1:
            next(data_iterator)
        return next_batch(data_iterator, **options)

    pretrain_glm.next_batch = next_batch_of_another_loader
    try:
        pretrain_on_this_rank(flags)
    except (SystemExit, DisagreementError) as end:
        return f"{end} {end.__cause__}"
    return ""


@pytest.mark.ranks
@pytest.mark.parametrize("way", ["tensor", "pipeline"])
def test_a_run_ends_with_the_first_step(tmp_path, way):
    corpus = make_corpus(tmp_path, num_documents=60)
    flags = [*TINY, *corpus.flags, "--train-iters", "3", "--save", str(tmp_path / "save"),
             "--save-interval", "1", f"--{way}-model-parallel-size", "2"]
    for end in run_ranks(train_on_other_data, flags, world_size=2, initialize=False):
        assert "iteration 1: rank " in end
    assert not list((tmp_path / "save").glob("iter_*"))
