"""The model against logits of the released GLM-130B code (origin: tests/data/golden/README.md)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_glm.checkpoint.sat import load_full_state_dict
from megatron_glm.checkpoint.table import shard
from megatron_glm.model.glm_model import GLMModel
from tests.model.building import build_glm, forward_logits, sample_bounds
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "glm130b_tiny"
TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
# Megatron's layout, and whether sequence parallelism is on.
LAYOUTS = {
    "one rank": ({}, False),
    "tp 2": ({TP: 2}, False),
    "tp 2 with sequence parallelism": ({TP: 2}, True),
    "pp 2": ({PP: 2}, False),
    "pp 2 interleaved": ({PP: 2, "virtual_pipeline_model_parallel_size": 2}, False),
    "tp 2 x pp 2": ({TP: 2, PP: 2}, False),
}


def load_golden_weights(chunks: list[GLMModel]) -> None:
    """Copies this rank's part of the golden checkpoint into every parameter."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp = parallel_state.get_tensor_model_parallel_world_size()
    full = load_full_state_dict(GOLDEN / "sat")
    for chunk in chunks:
        first_layer = chunk.decoder.layers[0].layer_number - 1 if chunk.decoder.layers else 0
        for name, parameter in chunk.named_parameters():
            source = _global_name(name, first_layer)
            parameter.data.copy_(shard(source, full[source], tp_rank, tp))


def _global_name(name: str, first_layer: int) -> str:
    if name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    if name.startswith("decoder.layers."):
        prefix, layers, index, rest = name.split(".", 3)
        return f"{prefix}.{layers}.{int(index) + first_layer}.{rest}"
    return name


def golden_logits(angle_dtype: str, sequence_parallel: bool) -> np.ndarray | None:
    chunks = build_glm(rotary_angle_dtype=angle_dtype, sequence_parallel=sequence_parallel)
    load_golden_weights(chunks)
    cases = np.load(GOLDEN / "cases.npz")
    tokens = torch.from_numpy(cases["tokens"])
    logits = forward_logits(
        chunks,
        tokens,
        torch.from_numpy(cases["position_ids"]),
        sample_bounds(cases["samples"], tokens.shape[1]),
    )
    return None if logits is None else logits.numpy()


@pytest.mark.parametrize("angle_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_the_released_code(name, angle_dtype):
    layout, sequence_parallel = LAYOUTS[name]
    tp = layout.get(TP, 1)
    results = run_ranks(
        golden_logits, angle_dtype, sequence_parallel, world_size=tp * layout.get(PP, 1), **layout
    )
    cases = np.load(GOLDEN / "cases.npz")
    expected = cases["logits" if angle_dtype == "fp32" else "logits_fp16_rope"]
    for logits in results[-tp:]:
        assert np.abs(logits - expected).max() < 1e-4
        if angle_dtype == "fp32":
            loss = F.cross_entropy(
                torch.from_numpy(logits).flatten(0, 1),
                torch.from_numpy(cases["targets"]).flatten(),
                reduction="none",
            )
            assert np.abs(loss.numpy() - cases["loss"].ravel()).max() < 1e-4


def test_the_two_golden_sets_are_different_models():
    """A build that ignored the rotary mode would fail one of them."""
    cases = np.load(GOLDEN / "cases.npz")
    assert np.abs(cases["logits"] - cases["logits_fp16_rope"]).max() > 1e-2
