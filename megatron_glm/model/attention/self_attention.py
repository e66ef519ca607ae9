"""GLM's self-attention: Megatron's, with queries and keys rotated in the mixed projection."""

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_glm.model.fused.selection import uses_kernels
from megatron_glm.model.recomputation import apply_linear
from megatron_glm.model.rotary import rotate_query_key


class RotarySelfAttention(SelfAttention):
    """SelfAttention whose `rotary_pos_emb` is a rotation as `RotaryTable` gives it.

    Megatron's own slot for rotary embeddings lies behind the split into query, key and value, and
    takes angles: cosine and sine would be computed in every layer, and both rotated tensors kept
    for the backward beside the projection that the value keeps alive.
    """

    def __init__(self, *args, **arguments):
        """Arguments are SelfAttention's."""
        super().__init__(*args, **arguments)
        # Megatron's own linear adds the bias in a pass of its own, which the rotation saves;
        # Transformer Engine's adds it in the product, for free.
        if isinstance(self.linear_qkv, ColumnParallelLinear):
            self.linear_qkv.skip_bias_add = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        *,
        rotary_pos_emb: Tensor,
        **arguments,
    ) -> tuple[Tensor, Tensor | None]:
        """As SelfAttention's; rotary_pos_emb: fp32 [s, b, 1, d], s being the full length."""
        # What Megatron calls key_value_states goes to get_query_key_value_tensors and nowhere
        # else, and is idle in self-attention: the rotation travels there.
        return super().forward(
            hidden_states, attention_mask, key_value_states=rotary_pos_emb, **arguments
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor, **arguments
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value, each [s, b, n, d], n being the heads of this rank."""
        mixed, bias = apply_linear(self.linear_qkv, hidden_states)
        mixed = mixed.unflatten(-1, (-1, 3 * self.hidden_size_per_attention_head))
        if uses_kernels(self.config, mixed):
            from megatron_glm.model.fused.rotary import rotate_query_key_

            return rotate_query_key_(mixed, bias, key_value_states)
        return rotate_query_key(mixed, bias, key_value_states)
