"""A job's step is built from its stages as its schedule would be."""

import pytest

from benchmarks.training import job, work
from benchmarks.training.job import LAYOUTS, Links, Times

GLM_130B = LAYOUTS["130b"]
NO_WAIT = Links(float("inf"), float("inf"))
PEAK = 1e15


def test_the_layout_is_the_papers():
    layers = [GLM_130B.num_layers(stage) for stage in range(8)]
    assert layers == [8, 9, 9, 9, 9, 9, 9, 8] and sum(layers) == GLM_130B.size.num_layers
    assert GLM_130B.num_gpus == 768 and GLM_130B.job_size().num_sequences == 4224


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_stages_do_the_work_of_the_whole_model(layout):
    stages = [layout.stage_size(stage) for stage in range(layout.pipeline)]
    assert sum(map(work.num_weights, stages)) == work.num_weights(layout.size)
    flops = [work.model_flops(size, work.formula_load(size)) for size in stages]
    whole = work.model_flops(layout.size, work.formula_load(layout.size))
    assert sum(flops) == whole


def test_without_communication_only_the_bubble_is_lost():
    # Every stage at half of the peak, if the stages had the same work.
    size = GLM_130B.job_size()
    work_of_a_stage = work.model_flops(size, work.formula_load(size)) / 8 / 24 / 4 / 176
    times = dict.fromkeys(GLM_130B.stages, Times(work_of_a_stage / (PEAK / 2), 0.0))
    row = job.job_row(GLM_130B, times, NO_WAIT, PEAK)
    assert row["bubble"] == pytest.approx(7 / 183)
    assert row["mfu"] == pytest.approx(0.5 * 176 / 183)
    assert row["communication"] == pytest.approx(0)


def test_the_slowest_stage_sets_the_pace_and_the_optimizer_comes_once():
    slow = {0: Times(0.1, 0.0), 4: Times(0.2, 0.05), 7: Times(0.1, 0.3)}
    assert job.job_row(GLM_130B, slow, NO_WAIT, PEAK)["step_ms"] == pytest.approx(
        1e3 * (183 * 0.2 + 0.3)
    )


def test_communication_of_a_micro_batch():
    # 2048 tokens of 12288 numbers in 2 bytes; 3/4 of them pass 6 times in each of 9 layers, a
    # quarter of them twice to the neighbours.
    hidden = 2048 * 12288 * 2
    inside = job.exposed_seconds(GLM_130B, 4, Links(100e9, float("inf")))
    assert inside == pytest.approx(9 * 6 * 0.75 * hidden / 100e9)
    between = job.exposed_seconds(GLM_130B, 4, Links(float("inf"), 50e9))
    assert between == pytest.approx(2 * hidden / 4 / 50e9)


def test_sharding_is_hidden_by_one_pass_at_most():
    links = Links(float("inf"), 50e9)
    # The last stage has most: 8 layers of 4 h^2 + 3 h f, and the logits; on 4 ranks.
    weights = (8 * (4 * 12288**2 + 3 * 12288 * 32768) + 150528 * 12288) / 4
    whole = (4 + 2) * weights * 23 / 24 / 50e9
    assert job.sharding_seconds(GLM_130B, links, 0.0) == pytest.approx(whole)
    assert job.sharding_seconds(GLM_130B, links, 0.06) == pytest.approx(whole - 0.06)
    assert job.sharding_seconds(GLM_130B, links, 10.0) == 0
