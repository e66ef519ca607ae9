"""The MLP of a layer: Megatron's, with bias and GeGLU in one kernel where kernels run."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_glm.model.fused.selection import uses_kernels
from megatron_glm.model.recomputation import apply_linear, give_recipe


class GegluMLP(MLP):
    """MLP whose activation is GeGLU with the exact GELU; hidden_states [s, b, h]."""

    def forward(self, hidden_states: Tensor, **arguments) -> tuple[Tensor, Tensor]:
        """As MLP's, whose other arguments are for experts."""
        activation = self._activation(*apply_linear(self.linear_fc1, hidden_states))
        y = activation()
        if self.config.glm_recompute_norms_and_geglu:
            give_recipe(y, activation)
        return apply_linear(self.linear_fc2, y)

    def _activation(self, x: Tensor, bias: Tensor) -> Callable[[], Tensor]:
        """gelu(x1 + b1) * (x2 + b2) as a function of nothing, which holds no more than its
        backward pass keeps."""
        if not uses_kernels(self.config, x):
            return partial(_geglu, x + bias)
        from megatron_glm.model.fused.geglu import bias_geglu

        return partial(bias_geglu, x, bias)


def _geglu(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return F.gelu(first) * second
