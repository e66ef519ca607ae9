"""The harness that gives tests several gloo ranks."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks

pytestmark = pytest.mark.ranks


def total(value):
    tensor = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor


def layout():
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def environment():
    return dist.is_initialized(), os.environ["RANK"], torch.get_num_threads()


def leave_a_mark():
    sys.modules["mark"] = "left"
    return "mark" in sys.modules


def see_a_mark():
    return "mark" in sys.modules


def fail_on_one(rank):
    if dist.get_rank() == rank:
        raise ValueError("the weights are wrong")
    dist.barrier()


def hang_on_one():
    if dist.get_rank() == 1:
        time.sleep(1000)


def die():
    os._exit(3)


def unpicklable():
    return lambda: None


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size):
    expected = torch.tensor([3 * sum(range(1, world_size + 1))])
    for rank, (own, tensor) in enumerate(run_ranks(total, 3, world_size=world_size)):
        assert own == rank
        assert torch.equal(tensor, expected)


def test_layout_reaches_megatron():
    results = run_ranks(layout, world_size=4, tensor_model_parallel_size=2)
    assert results == [(2, 0, 2)] * 4
    results = run_ranks(layout, world_size=4, pipeline_model_parallel_size=4)
    assert results == [(1, stage, 1) for stage in range(4)]


def test_without_initialization_only_the_environment_is_set():
    assert run_ranks(environment, initialize=False) == [(False, "0", 1), (False, "1", 1)]


def test_no_state_outlives_a_call():
    assert run_ranks(leave_a_mark, world_size=1) == [True]
    assert run_ranks(see_a_mark, world_size=1) == [False]


def test_an_exception_names_its_rank_and_ends_the_others_soon():
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1: Traceback(.|\n)*the weights are wrong"):
        run_ranks(fail_on_one, 1, world_size=3)
    assert time.monotonic() - start < 20


def test_a_hanging_rank_is_killed_and_its_place_shown():
    with pytest.raises(RankError, match="rank 1: no answer(.|\n)*hang_on_one"):
        run_ranks(hang_on_one, timeout=3)


def test_a_dead_process_is_reported():
    with pytest.raises(RankError, match="rank 0: the process died"):
        run_ranks(die, world_size=1)


def test_an_unpicklable_result_is_reported():
    with pytest.raises(RankError, match="pickle"):
        run_ranks(unpicklable, world_size=1)
