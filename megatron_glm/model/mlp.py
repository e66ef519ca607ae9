"""The MLP of a layer: Megatron's, with bias and GeGLU in one kernel where kernels run."""

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_glm.model.fused.selection import uses_kernels


class GegluMLP(MLP):
    """MLP whose activation is GeGLU with the exact GELU; hidden_states [s, b, h]."""

    def forward(self, hidden_states: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        """As MLP's, whose other arguments are for experts."""
        if not uses_kernels(self.config, hidden_states):
            return super().forward(hidden_states, **arguments)
        from megatron_glm.model.fused.geglu import bias_geglu

        return self.linear_fc2(bias_geglu(*self.linear_fc1(hidden_states)))
