"""Prefix attention in the `core_attention` slot of Megatron's self-attention."""

import math
from contextlib import nullcontext

from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import load_backend, select_backend
from megatron_glm.model.dropout import draw_dropout


class PrefixAttention(MegatronModule):
    """GLM's attention over packed samples, on the backend of `--glm-attention-backend`.

    Has no parameters. Takes the samples of the batch, int32 [b, 2, k], where Megatron passes its
    attention mask; the meaning is in `bounds`.

    Raises:
        GLMError: grouped-query attention, context parallelism, a sliding window, a softmax
            offset or query-key layer scaling, none of which GLM has; an unknown backend.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        _refuse_unsupported(config, attention_type)
        self.layer_number = layer_number
        self.backend = config.glm_attention_backend
        if self.backend != "auto":
            load_backend(self.backend)
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.dropout_probability = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
    ) -> Tensor:
        """Attend; query, key and value [s, b, n, d], the samples as `attention_mask`.

        Returns:
            [s, b, n * d] of the dtype of `query`, n being the heads of this rank.
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "PrefixAttention takes neither attention_bias nor packed_seq_params: packing is "
                "described by the samples [b, 2, k] in attention_mask"
            )
        probability = self.dropout_probability if self.training else 0.0
        return select_backend(self.backend, query.device.type)(
            query,
            key,
            value,
            attention_mask,
            softmax_scale=self.softmax_scale,
            dropout=self._draw_dropout(probability, query.device),
        )

    def _draw_dropout(self, probability, device):
        if probability == 0.0:
            return None
        # Every rank of a tensor-parallel group has its own heads and must drop its own: under
        # sequence parallelism the whole block already runs in the forked state.
        forked = self.config.sequence_parallel
        with nullcontext() if forked else tensor_parallel.get_cuda_rng_tracker().fork():
            return draw_dropout(probability, device)


def _refuse_unsupported(config, attention_type):
    refusals = (
        (attention_type != "self", "cross-attention", "GLM has self-attention alone"),
        (
            config.num_query_groups != config.num_attention_heads,
            f"--num-query-groups {config.num_query_groups}",
            f"leave out --group-query-attention: GLM has one key head for each of its "
            f"{config.num_attention_heads} query heads",
        ),
        (
            config.context_parallel_size != 1,
            f"--context-parallel-size {config.context_parallel_size}",
            "prefix attention has no context parallelism; set it to 1",
        ),
        (config.window_size is not None, f"--window-size {config.window_size}", "leave it out"),
        (config.softmax_type != "vanilla", f"--softmax-type {config.softmax_type}", "use vanilla"),
        (
            config.apply_query_key_layer_scaling,
            "--apply-query-key-layer-scaling",
            "leave it out: the softmax is always in fp32",
        ),
    )
    for refused, setting, cure in refusals:
        if refused:
            raise GLMError(f"{setting}: {cure}")
