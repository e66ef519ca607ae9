"""DeepNorm: the residual, and standard deviations of the initialisation on whole matrices."""

import numpy as np
import pytest
import torch

from megatron_glm.model.deepnorm import DeepNormLayerNorm
from tests.model.building import build_glm
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
NUM_LAYERS, HIDDEN, FFN, HEADS = 8, 256, 704, 8


def initial_weights() -> dict[str, np.ndarray]:
    (model,) = build_glm(num_layers=NUM_LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN,
                         num_attention_heads=HEADS)
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def expected_std(fan_in: int, fan_out: int, gain: float) -> float:
    """Xavier normal of the whole matrix (DeepNet, arXiv 2203.00555, figure 2 and table 1)."""
    return gain * (2 / (fan_in + fan_out)) ** 0.5


def assert_std(values: np.ndarray, std: float, what: str) -> None:
    """Within five standard errors of a normal sample's deviation, and centred."""
    tolerance = 5 * std / (2 * values.size) ** 0.5
    assert abs(values.std() - std) < tolerance, (what, values.std(), std)
    assert abs(values.mean()) < 5 * std / values.size**0.5, what


@pytest.mark.parametrize("tp", [1, 4])
def test_initialisation_of_every_matrix(tp):
    beta = (2 * NUM_LAYERS) ** -0.5
    for rank, weights in enumerate(
        run_ranks(initial_weights, world_size=tp, tensor_model_parallel_size=tp)
    ):
        for name, weight in weights.items():
            what = f"rank {rank} {name}"
            if name.endswith("linear_qkv.weight"):
                per_head = weight.reshape(HEADS // tp, 3, HIDDEN // HEADS, HIDDEN)
                for part, gain in enumerate((1.0, 1.0, beta)):
                    std = expected_std(HIDDEN, HIDDEN, gain)
                    assert_std(per_head[:, part], std, f"{what} {'qkv'[part]}")
            elif name.endswith("linear_proj.weight"):
                assert_std(weight, expected_std(HIDDEN, HIDDEN, beta), what)
            elif name.endswith(("linear_fc1.weight", "linear_fc2.weight")):
                assert_std(weight, expected_std(HIDDEN, FFN, beta), what)
            elif name == "embedding.word_embeddings.weight":
                assert_std(weight, 0.0052, what)
            elif name.endswith("layernorm.weight"):
                assert (weight == 1).all(), what
            else:
                assert name.endswith("bias") and (weight == 0).all(), what


def test_tensor_parallel_shards_are_drawn_apart():
    first, second = run_ranks(
        initial_weights, world_size=2, tensor_model_parallel_size=2
    )
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert abs(np.corrcoef(first[name].ravel(), second[name].ravel())[0, 1]) < 0.02


def residual_stream() -> tuple[np.ndarray, np.ndarray]:
    """Output of one layer with both sublayers silenced, and the naive formula of it."""
    (model,) = build_glm(num_layers=3)
    layer = model.decoder.layers[0]
    assert isinstance(layer.input_layernorm, DeepNormLayerNorm)
    for linear in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
        torch.nn.init.zeros_(linear.weight)
    x = torch.randn(16, 1, 64)
    samples = torch.tensor([[[4], [16]]], dtype=torch.int32)
    output, _ = layer(
        hidden_states=x, attention_mask=samples, rotary_pos_emb=torch.zeros(16, 1, 1, 16)
    )
    alpha = (2 * 3) ** 0.5
    norm = torch.nn.functional.layer_norm
    expected = alpha * norm(alpha * norm(x, (64,)), (64,))
    return output.detach().numpy(), expected.numpy()


def test_the_residual_is_the_scaled_norm():
    (result,) = run_ranks(residual_stream, world_size=1)
    np.testing.assert_allclose(*result, rtol=1e-5, atol=1e-6)
