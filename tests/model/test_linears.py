"""Which linears a layer is made of, and what is said where they cannot be had."""

import sys

import pytest
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megatron_glm.errors import GLMError
from megatron_glm.model.config import GLMTransformerConfig
from megatron_glm.model.layer_spec import glm_layer_spec
from megatron_glm.model.linears import Linears, select_linears


def test_megatrons_own_are_the_default():
    config = GLMTransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    assert select_linears(config.transformer_impl) == (ColumnParallelLinear, RowParallelLinear)


def test_without_transformer_engine_the_error_has_the_cure(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("transformer_engine.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    cure = r"--transformer-impl transformer_engine.*pip install.*transformer-engine\[pytorch\]==2"
    with pytest.raises(GLMError, match=cure) as refusal:
        select_linears("transformer_engine")
    assert "\n" not in str(refusal.value)


def test_another_implementation_is_refused():
    with pytest.raises(GLMError, match="--transformer-impl inference_optimized: must be local or"):
        select_linears("inference_optimized")


def test_every_linear_of_a_layer_is_of_the_given_kind():
    config = GLMTransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    layer = glm_layer_spec(Linears(lambda **_: "column", lambda **_: "row")).submodules
    attention = layer.self_attention.submodules
    mlp = layer.mlp.keywords["submodules"]
    linears = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    built = [linear(config=config, init_method=None) for linear in linears]
    assert built == ["column", "row", "column", "row"]
