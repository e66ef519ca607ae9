"""A run that goes on with another batch size ends where its flags say, and has data until then."""

from argparse import Namespace

import pytest
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)

from megatron_glm.errors import GLMError
from megatron_glm.training.run_length import num_training_sequences
from tests.training.pretraining import TINY, pretrain


@pytest.fixture
def begin():
    """Sets batches of 8, or the schedule of them, in sequences of 32 tokens."""

    def init(schedule=None):
        size = None if schedule else 8
        init_num_microbatches_calculator(
            1, global_batch_size=size, micro_batch_size=1, data_parallel_size=1,
            step_batch_size_schedule=schedule, seq_length=32,
        )  # fmt: skip

    yield init
    unset_num_microbatches_calculator()


def run_at(iteration: int, consumed: int, **changes) -> Namespace:
    return Namespace(**{
        "iteration": iteration, "consumed_train_samples": consumed, "global_batch_size": 8,
        "train_iters": None, "train_samples": None, "skip_train": False, "load": "folder",
    } | changes)  # fmt: skip


@pytest.mark.parametrize("args, train_iters, end", [
    (run_at(0, 0, train_samples=50), 6, 48), (run_at(3, 24, train_samples=50), 6, 48),
    (run_at(3, 12, train_samples=50), 7, 44), (run_at(3, 48, train_samples=72), 6, 72),
    (run_at(0, 0, train_iters=6), 6, 48), (run_at(3, 48, train_iters=6), 6, 72),
    (run_at(3, 12, train_iters=6), 6, 36), (run_at(3, 9, train_iters=2, skip_train=True), 2, 9),
])  # fmt: skip
def test_a_run_has_data_to_its_end(begin, args, train_iters, end):
    begin()
    assert num_training_sequences(args) == end
    assert args.train_iters == train_iters


@pytest.mark.parametrize("iteration, consumed, train_iters, end", [(0, 0, 7, 44), (1, 2, 8, 46)])
def test_a_run_on_a_schedule_has_data_to_its_end(begin, iteration, consumed, train_iters, end):
    begin("0:4 384:8")  # 12 samples in batches of 4.
    args = run_at(iteration, consumed, train_samples=50)
    assert num_training_sequences(args) == end
    assert args.train_iters == train_iters
    assert get_current_global_batch_size() == 4  # As of the step that is next.


@pytest.mark.parametrize("args", [
    run_at(3, 24, train_samples=31), run_at(3, 24, train_iters=3), run_at(3, 12, train_iters=3),
])  # fmt: skip
def test_a_run_that_is_at_its_end_is_refused(begin, args):
    begin()
    with pytest.raises(GLMError, match="--load folder: iteration 3 has seen all"):
        num_training_sequences(args)


@pytest.mark.ranks
def test_a_resumed_run_with_a_smaller_batch_goes_to_the_end(corpus, tmp_path):
    run = [*TINY, *corpus.flags, "--lr-warmup-iters", "0", "--train-samples", "24",
           "--save", str(tmp_path), "--load", str(tmp_path)]  # fmt: skip
    assert len(pretrain([*run, "--exit-interval", "2"])) == 2
    assert len(pretrain([*run, "--global-batch-size", "4"])) == 2
