"""The worst moment of a rank, against Megatron's schedule on tensors without data."""

import pytest

from megatron_glm.planning.memory import GIB, MIB, Overheads, fullest_rank, rank_memory
from megatron_glm.planning.parameters import state_bytes
from tests.planning.jobs import FULL, GLM_130B, NORMS_AND_GEGLU, SMALL
from tests.planning.simulated_rank import simulate

NONE = Overheads(cuda_context=0, nccl=0, cublas_workspace=0, fragmentation=0.0)
# The optimizer is not simulated; without gradients in fp32 its step would be the worst moment.
PLAIN = {
    "use_distributed_optimizer": False, "data_parallel_size": 1, "global_batch_size": 8,
    "accumulate_allreduce_grads_in_fp32": True,
}  # fmt: skip


def compare(job, stage, tolerance):
    """Forecast and simulation agree, as shares of all that the simulated rank holds."""
    simulated = simulate(job, stage)
    forecast = rank_memory(job, stage, NONE)
    assert forecast.parameters + forecast.gradients == pytest.approx(simulated.state, rel=1e-6)
    passing = forecast.allocated - sum(state_bytes(job, stage))
    whole = simulated.state + simulated.peak
    assert abs(passing - simulated.peak) <= tolerance * whole, forecast.moment


@pytest.mark.parametrize(
    "stage, changes",
    [
        (0, FULL),
        (3, FULL | {"sequence_parallel": True}),
        (7, FULL),
        (1, {"recompute_granularity": None}),
        (0, NORMS_AND_GEGLU | {"recompute_granularity": None, "sequence_parallel": True}),
        (6, {"recompute_granularity": None, "glm_fused_kernels": False, "global_batch_size": 4}),
    ],
)
def test_a_rank_of_glm_130b_takes_what_is_forecast(stage, changes):
    compare(GLM_130B.with_(**PLAIN | changes), stage, 2e-3)


SMALL_DEEP = SMALL.with_(
    num_layers=6, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=16,
    padded_vocab_size=8192, seq_length=512, micro_batch_size=1, global_batch_size=6,
)  # fmt: skip


@pytest.mark.parametrize(
    "stage, changes",
    [
        (0, {}),
        (0, {"micro_batch_size": 6}),
        (0, {"dtype": "fp32"}),
        (0, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (1, {"pipeline_model_parallel_size": 3}),
        (2, {"pipeline_model_parallel_size": 3, "micro_batch_size": 2}),
        (1, {"pipeline_model_parallel_size": 3, **FULL, "recompute_num_layers": 2}),
        (0, {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}),
        (0, {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}),
        (0, NORMS_AND_GEGLU),
        (0, NORMS_AND_GEGLU | {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (0, NORMS_AND_GEGLU | {"recompute_granularity": "selective",
                               "recompute_modules": ("mlp",)}),
        (1, NORMS_AND_GEGLU | {"pipeline_model_parallel_size": 3, "glm_fused_kernels": False}),
        (0, {"glm_fused_kernels": False, "num_layers": 2, "global_batch_size": 2}),
        (1, {"glm_fused_kernels": False, "pipeline_model_parallel_size": 3, **FULL}),
    ],
)
def test_other_layouts_take_what_is_forecast(stage, changes):
    compare(SMALL_DEEP.with_(**changes), stage, 0.02)


def test_overheads_are_added_by_name():
    overheads = Overheads(
        cuda_context=1 * GIB, nccl=2 * GIB, cublas_workspace=3 * MIB, fragmentation=0.1
    )
    bare, full = rank_memory(GLM_130B, 1, NONE), rank_memory(GLM_130B, 1, overheads)
    assert full.allocated - bare.allocated == 3 * MIB
    assert full.reserved == pytest.approx(1.1 * full.allocated, rel=1e-9)
    assert full.total - full.reserved == 3 * GIB
    alone = SMALL.with_(data_parallel_size=1)
    assert rank_memory(alone, 0, overheads).outside == 1 * GIB


def test_the_fullest_rank_is_the_one_with_most_in_flight():
    job = GLM_130B.with_(recompute_granularity=None)
    assert fullest_rank(job).stage == 0
    assert fullest_rank(job).total == max(rank_memory(job, stage).total for stage in range(8))


def test_the_optimizer_step_can_be_the_worst_moment():
    job = SMALL.with_(
        hidden_size=1024, ffn_hidden_size=2816, seq_length=16, micro_batch_size=1, dtype="fp16",
        num_layers=12, accumulate_allreduce_grads_in_fp32=False,
    )  # fmt: skip
    forecast = rank_memory(job, 0)
    assert (forecast.moment, forecast.activations) == ("optimizer step", 0)
    assert forecast.temporary == forecast.optimizer // 3
