"""Which module fills each slot of Megatron's transformer layer."""

from functools import partial

from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_glm.model.attention.core_attention import PrefixAttention
from megatron_glm.model.attention.self_attention import RotarySelfAttention
from megatron_glm.model.config import GLMTransformerConfig
from megatron_glm.model.deepnorm import (
    DeepNormLayerNorm,
    LayerNorm,
    attention_output_init,
    feed_forward_init,
    query_key_value_init,
    with_init,
)
from megatron_glm.model.linears import Linears, select_linears
from megatron_glm.model.mlp import GegluMLP
from megatron_glm.model.residual import get_bias_dropout_add, get_bias_dropout_sum


def glm_layer_spec(linears: Linears) -> ModuleSpec:
    """Spec of one GLM layer made of `linears`; all else is the same whatever these are."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=DeepNormLayerNorm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=with_init(linears.column, query_key_value_init),
                    core_attention=PrefixAttention,
                    linear_proj=with_init(linears.row, attention_output_init),
                ),
            ),
            self_attn_bda=get_bias_dropout_sum,
            pre_mlp_layernorm=DeepNormLayerNorm,
            mlp=partial(
                GegluMLP.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=with_init(linears.column, feed_forward_init),
                    linear_fc2=with_init(linears.row, feed_forward_init),
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def glm_block_spec(
    config: GLMTransformerConfig, vp_stage: int | None, pp_rank: int | None
) -> TransformerBlockSubmodules:
    """Spec of the layers of one pipeline stage (or virtual stage) and the final norm.

    The whole block rather than a layer is handed over because a bare layer spec makes Megatron
    choose the final norm itself, one that refuses sequence parallelism.
    """
    linears = select_linears(config.transformer_impl)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(
        layer_specs=[glm_layer_spec(linears) for _ in range(num_layers)], layer_norm=LayerNorm
    )
