"""Parameters, gradient buffers and optimizer state of a rank: what Megatron builds."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_glm.planning.parameters import (
    buffer_numel,
    chunk_parameters,
    parameters_of_model,
    parameters_of_rank,
    state_bytes,
)
from tests.planning.jobs import GLM_130B, SMALL
from tests.planning.simulated_rank import parameters_of
from tests.ranks import run_ranks
from tests.training.stepping import SEQUENCE, VOCABULARY, Stepping

INTERLEAVED = GLM_130B.with_(
    decoder_first_pipeline_num_layers=None, decoder_last_pipeline_num_layers=None,
    account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True,
    virtual_pipeline_model_parallel_size=3,
)  # fmt: skip


def test_glm_130b_has_its_parameters():
    # tools/dry_run.py builds the modules and counts the same.
    assert parameters_of_model(GLM_130B) == 128_697_794_560
    assert [parameters_of_rank(GLM_130B, stage) for stage in (0, 1, 6, 7)] == [
        4_087_095_296, 4_077_757_440, 4_077_757_440, 4_087_119_872,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "job, stage",
    [(GLM_130B, 0), (GLM_130B, 5), (GLM_130B, 7), (INTERLEAVED, 0), (INTERLEAVED, 7), (SMALL, 0)],
)
def test_every_parameter_is_that_of_the_model(job, stage):
    for chunk, built in enumerate(parameters_of(job, stage)):
        forecast = chunk_parameters(job, stage, chunk)
        assert [(p.name, p.numel) for p in forecast] == [
            (parameter.name_in_model, parameter.numel()) for parameter in built
        ]
        assert [p.name for p in forecast if p.is_tied] == [
            parameter.name_in_model for parameter in built
            if getattr(parameter, "shared_embedding", False)
        ]  # fmt: skip


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("data_parallel_size", [1, 6, 24])
@pytest.mark.parametrize("stage", [0, 7])
def test_buffers_are_padded_as_megatron_pads_them(stage, data_parallel_size, overlap):
    job = GLM_130B.with_(
        # Neither multiples of 64.
        hidden_size=96 * 122, ffn_hidden_size=4 * 8191, padded_vocab_size=4 * 37601,
        kv_channels=122, data_parallel_size=data_parallel_size, overlap_grad_reduce=overlap,
        global_batch_size=24,
    )  # fmt: skip
    (built,) = parameters_of(job, stage)
    bucket_size = max(40_000_000, 1_000_000 * data_parallel_size) if overlap else None
    layout = DistributedOptimizer._compute_per_buffer_param_layout(
        built, bucket_size if stage == 0 else None, data_parallel_size,
        DistributedDataParallelConfig(use_distributed_optimizer=True),
    )  # fmt: skip
    assert buffer_numel(job, stage) == layout.bucket_indices[-1][1]


def measure_state(dtype: str, distributed: bool, precision_aware: bool) -> tuple[int, int, int]:
    """Bytes of parameters, gradient buffers and optimizer state on this rank after a step."""
    stepping = Stepping(dtype, distributed, precision_aware)
    stepping.step()
    buffers = stepping.model.buffers
    parameters = {p.untyped_storage()._cdata: p.untyped_storage() for p in
                  stepping.model.parameters()}
    optimizer = stepping.optimizer.chained_optimizers[0]
    state = [v for values in optimizer.optimizer.state.values() for v in values.values()]
    main = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    own = {t.untyped_storage()._cdata: t.untyped_storage() for t in [*state, *main]
           if t.numel() > 1 and t.untyped_storage()._cdata not in parameters}
    size = torch.distributed.get_world_size(parallel_state.get_data_parallel_group())
    assert size == 2
    return (
        sum(storage.nbytes() for storage in parameters.values()),
        sum(buffer.grad_data.nbytes for buffer in buffers),
        sum(storage.nbytes() for storage in own.values()),
    )


@pytest.mark.ranks
@pytest.mark.parametrize("dtype, distributed, precision_aware", [
    ("bf16", False, False), ("bf16", True, False), ("bf16", True, True),
    ("fp32", False, False), ("fp32", True, False),
])  # fmt: skip
def test_a_rank_holds_the_state_that_is_forecast(dtype, distributed, precision_aware):
    job = SMALL.with_(
        num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4,
        padded_vocab_size=VOCABULARY, seq_length=SEQUENCE, data_parallel_size=2, dtype=dtype,
        use_distributed_optimizer=distributed, use_precision_aware_optimizer=precision_aware,
    )  # fmt: skip
    ranks = run_ranks(measure_state, dtype, distributed, precision_aware)
    forecast = state_bytes(job, 0)
    # The buffers of this small model have no padding but that of their end.
    padding = 128 * 12
    for name, measured in zip(("parameters", "gradients"), zip(*ranks, strict=True), strict=False):
        for value in measured:
            assert 0 <= getattr(forecast, name) - value <= padding, name
    assert 0 <= forecast.optimizer * len(ranks) - sum(rank[2] for rank in ranks) <= 2 * padding
