"""What autograd keeps, byte for byte, and that of real tensors on real ranks."""

import pytest
import torch

from megatron_glm.planning import activations
from tests.model.building import build_glm
from tests.planning.jobs import FULL, GLM_130B, NORMS_AND_GEGLU, SMALL
from tests.planning.simulated_rank import DTYPES, kept_by_autograd, kept_bytes
from tests.ranks import run_ranks

SELECTIVE = {"recompute_granularity": "selective"}
VARIANTS = {
    "one rank": {},
    "tp 2": {"tensor_model_parallel_size": 2},
    "sequence parallelism": {"tensor_model_parallel_size": 4, "sequence_parallel": True},
    "attention recomputed": SELECTIVE | {"recompute_modules": ("core_attn",)},
    "MLP recomputed": SELECTIVE | {"recompute_modules": ("mlp",)},
    "norms and GeGLU recomputed": NORMS_AND_GEGLU,
    "norms and GeGLU recomputed, tp 2": NORMS_AND_GEGLU | {"tensor_model_parallel_size": 2},
    "norms and all of the MLP recomputed": (
        SELECTIVE | {"recompute_modules": ("mlp",)} | NORMS_AND_GEGLU
    ),
    "every layer recomputed": FULL,
    "groups of three recomputed": FULL | {"recompute_num_layers": 3},
    "one layer recomputed": FULL | {"recompute_method": "block"},
    "inputs split": FULL | {"tensor_model_parallel_size": 2, "distribute_saved_activations": True},
    "no dropout": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
    "long": {"seq_length": 512, "micro_batch_size": 1},
}


@pytest.mark.parametrize("fused", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bytes_that_autograd_keeps_are_forecast(variant, fused):
    job = SMALL.with_(**VARIANTS[variant], glm_fused_kernels=fused)
    # All but the samples, seeds of dropout and, in fp32 without kernels, the rounded rotations.
    tolerance = 5e-3 if job.dtype == "fp32" else 5e-4
    assert activations.chunk_bytes(job, 0, 0) == pytest.approx(kept_bytes(job, 0), rel=tolerance)


@pytest.mark.parametrize("stage", [0, 3, 7])
def test_a_stage_of_glm_130b_keeps_what_is_forecast(stage):
    job = GLM_130B.with_(recompute_granularity=None)
    forecast = activations.chunk_bytes(job, stage, 0)
    assert forecast == pytest.approx(kept_bytes(job, stage), rel=1e-4)


def measure_on_a_rank(sequence_parallel: bool, dtype: str, options: dict) -> int:
    torch.manual_seed(0)
    (model,) = build_glm(
        num_layers=3, hidden_size=128, ffn_hidden_size=352, vocab_size=256, seq_length=64,
        sequence_parallel=sequence_parallel, params_dtype=DTYPES[dtype], bf16=dtype == "bf16",
        **options,
    )  # fmt: skip
    tokens = torch.randint(256, (2, 64))
    positions = torch.arange(64).expand(2, -1)
    samples = torch.tensor([[[20], [64]]] * 2, dtype=torch.int32)
    rows = torch.arange(tokens.numel())
    return kept_by_autograd(
        model, lambda: model(tokens, positions, samples, labels=tokens, target_rows=rows)
    )


@pytest.mark.ranks
@pytest.mark.parametrize(
    "tp, sequence_parallel, dtype, options",
    [
        (1, False, "fp32", {}),
        (2, False, "bf16", {}),
        (2, True, "bf16", {}),
        (2, True, "bf16", {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
        (1, False, "fp32", NORMS_AND_GEGLU),
        (2, True, "bf16", NORMS_AND_GEGLU),
        (2, True, "bf16", FULL),
    ],
)
def test_real_ranks_keep_what_is_forecast(tp, sequence_parallel, dtype, options):
    ranks = run_ranks(
        measure_on_a_rank, sequence_parallel, dtype, options, world_size=tp,
        tensor_model_parallel_size=tp,
    )  # fmt: skip
    job = SMALL.with_(
        num_layers=3, hidden_size=128, ffn_hidden_size=352, num_attention_heads=4,
        padded_vocab_size=256, seq_length=64, tensor_model_parallel_size=tp,
        sequence_parallel=sequence_parallel, dtype=dtype, hidden_dropout=0.0,
        attention_dropout=0.0, glm_fused_kernels=False,
    ).with_(**{name: tuple(value) if isinstance(value, list) else value
               for name, value in options.items()})  # fmt: skip
    assert ranks == pytest.approx([activations.chunk_bytes(job, 0, 0)] * tp, rel=0.01)


def test_attention_is_not_worth_recomputing():
    whole = sum(activations.layer(GLM_130B.with_(recompute_granularity=None)).values())
    job = GLM_130B.with_(recompute_granularity="selective", recompute_modules=("core_attn",))
    assert sum(activations.layer(job).values()) > 0.999 * whole
