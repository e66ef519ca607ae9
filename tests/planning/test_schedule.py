"""Pipelines against Megatron's own division of layers, the paper's figures and a naive count."""

import pytest

from megatron_glm.planning.job import PlanError
from megatron_glm.planning.schedule import (
    bubble_share,
    microbatches_in_flight,
    passes,
    stage_layers,
)
from tests.planning.jobs import GLM_130B, SMALL
from tests.planning.simulated_rank import parameters_of


def test_the_bubble_of_the_paper():
    # Appendix B.4: m = 176, p = 8, "only 3.8%".
    assert GLM_130B.num_microbatches == 176
    assert bubble_share(GLM_130B) == pytest.approx(7 / 183)
    assert round(100 * bubble_share(GLM_130B), 1) == 3.8


def test_stages_of_glm_130b():
    assert stage_layers(GLM_130B) == [[8], *[[9]] * 6, [8]]
    embedded = GLM_130B.with_(
        decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None,
        account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True,
    )  # fmt: skip
    assert stage_layers(embedded) == stage_layers(GLM_130B)
    interleaved = embedded.with_(virtual_pipeline_model_parallel_size=3)
    assert stage_layers(interleaved) == [[2, 3, 3], *[[3, 3, 3]] * 6, [3, 3, 2]]


@pytest.mark.parametrize(
    "changes",
    [
        {"pipeline_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 3, "decoder_first_pipeline_num_layers": 2},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
        {"pipeline_model_parallel_size": 7, "account_for_embedding_in_pipeline_split": True,
         "account_for_loss_in_pipeline_split": True},
    ],
)  # fmt: skip
def test_layers_are_where_megatron_builds_them(changes):
    job = SMALL.with_(num_layers=12, global_batch_size=84, **changes)
    built = [
        [sum(p.name_in_model.endswith("fc1.bias") for p in chunk) for chunk in
         parameters_of(job, stage)]
        for stage in range(job.pipeline_model_parallel_size)
    ]  # fmt: skip
    assert built == stage_layers(job)


def test_1f1b_keeps_as_many_micro_batches_as_stages_follow():
    counts = [microbatches_in_flight(GLM_130B, stage, (1,)) for stage in range(8)]
    assert counts == [[8], [7], [6], [5], [4], [3], [2], [1]]
    few = GLM_130B.with_(global_batch_size=24 * 3)
    assert [microbatches_in_flight(few, stage, (1,)) for stage in range(3)] == [[3]] * 3


@pytest.mark.parametrize("chunks, m", [(None, 2), (None, 16), (2, 8), (3, 16)])
def test_every_pass_comes_once_and_after_its_forward(chunks, m):
    job = SMALL.with_(
        num_layers=24, pipeline_model_parallel_size=4, global_batch_size=2 * m,
        virtual_pipeline_model_parallel_size=chunks,
    )  # fmt: skip
    for stage in range(4):
        done = list(passes(job, stage, m))
        assert len(done) == 2 * m * job.num_chunks
        for chunk in range(job.num_chunks):
            own = [kind for kind, number in done if number == chunk]
            balance = [own[: end + 1].count("forward") - own[: end + 1].count("backward")
                       for end in range(len(own))]
            assert min(balance) >= 0 and balance[-1] == 0
            assert own.count("forward") == m


def impossible(**changes) -> str:
    with pytest.raises(PlanError) as error:
        stage_layers(SMALL.with_(**changes))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_megatron_would_not_start_is_refused_by_flag():
    assert impossible(tensor_model_parallel_size=3).startswith("--tensor-model-parallel-size 3")
    assert impossible(pipeline_model_parallel_size=3).startswith("--pipeline-model-parallel-size 3")
    assert "16: must be divisible by 3, --micro-batch-size" in impossible(micro_batch_size=3)
    assert impossible(global_batch_size=15).startswith("--global-batch-size 15: must be divisible")
    assert "3 virtual stages" in impossible(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
    )
    assert "12: must be divisible by 8" in impossible(
        pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2,
        global_batch_size=12,
    )  # fmt: skip
    assert "drop one" in impossible(
        decoder_first_pipeline_num_layers=1, account_for_loss_in_pipeline_split=True
    )

