"""DeepNorm: the norm that hands on its scaled output as residual, and its initialisation.

a = LN1(x); h = alpha * a + Attn(a); m = LN2(h); x' = alpha * m + MLP(m), with alpha = (2N)^0.5
(paper, section 2.1: "Layer Normalization"). The residual is the normalised tensor.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_glm.model.config import GLMTransformerConfig
from megatron_glm.model.fused.selection import uses_kernels
from megatron_glm.model.recomputation import give_recipe
from megatron_glm.model.residual import ScaledResidual, Sum


class LayerNorm(torch.nn.LayerNorm):
    """LayerNorm over the last dimension that also works under sequence parallelism.

    Arguments are those that Megatron passes to a norm: `config`, `hidden_size` (h), `eps`.
    Parameters `weight` and `bias`, [h] in `config.params_dtype`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in self.parameters():
            # Megatron sums these gradients over the tensor parallel ranks when it is set.
            parameter.sequence_parallel = config.sequence_parallel


class DeepNormLayerNorm(LayerNorm):
    """LayerNorm whose forward returns (y, alpha * y): the layer's input and its residual.

    Takes a tensor [s, b, h] or the Sum that makes one. Where kernels run, y as the residual is
    a ScaledResidual, which whoever adds it multiplies.
    """

    # Read by Megatron's transformer layer: the norm's second output is the residual.
    returns_residual = True

    def __init__(self, config: GLMTransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps)
        self.config = config
        self.alpha = config.deepnorm_alpha

    def forward(self, x: Tensor | Sum) -> tuple[Tensor, Tensor | ScaledResidual]:
        if isinstance(x, Sum) or uses_kernels(self.config, x):
            from megatron_glm.model.fused.residual_norm import layer_norm, normalised, residual_norm

            norm = residual_norm if isinstance(x, Sum) else layer_norm
            y, residual = norm(x, self.weight, self.bias, self.eps)
            if self.config.glm_recompute_norms_and_geglu and y.requires_grad:
                z = normalised(y)
                give_recipe(y, lambda: layer_norm(z, self.weight, self.bias, self.eps)[0])
            return y, ScaledResidual(residual, self.alpha)
        y = super().forward(x)
        if self.config.glm_recompute_norms_and_geglu:
            give_recipe(y, partial(super().forward, x))
        return y, self.alpha * y


def xavier_normal_std(fan_in: int, fan_out: int, gain: float) -> float:
    """Standard deviation of Xavier's normal initialisation of a whole [fan_out, fan_in] matrix."""
    return gain * (2.0 / (fan_in + fan_out)) ** 0.5


def normal_init(std: float) -> Callable[[Tensor], None]:
    """Initialiser that fills a weight, or a shard of one, from N(0, std^2)."""

    def init(weight: Tensor) -> None:
        torch.nn.init.normal_(weight, mean=0.0, std=std)

    return init


def query_key_value_init(config: GLMTransformerConfig) -> Callable[[Tensor], None]:
    """Initialiser of linear_qkv, [3h, h] or its tensor parallel rows, per head [q, k, v].

    q and k have gain 1, v gain beta; each of the three is an h x h matrix by itself, whatever
    share of its rows is here.
    """
    h, d = config.hidden_size, config.kv_channels
    gains = (1.0, 1.0, config.deepnorm_beta)
    stds = [xavier_normal_std(h, d * config.num_attention_heads, gain) for gain in gains]

    def init(weight: Tensor) -> None:
        with torch.no_grad():
            per_head = weight.view(-1, 3, d, h)
            for part, std in enumerate(stds):
                # Drawn apart and copied: normal_ on a strided view depends on its layout.
                per_head[:, part].copy_(torch.empty_like(per_head[:, part]).normal_(0.0, std))

    return init


def with_init(linear: Callable, make_init: Callable[[GLMTransformerConfig], Callable]) -> Callable:
    """Builder of `linear` that initialises its weight by `make_init(config)`.

    The deviation comes from the configuration's full sizes: Megatron hands the initialiser a
    tensor parallel shard on the GPU and the whole matrix on the CPU, whose shapes differ.
    """

    def build(*args, config: GLMTransformerConfig, init_method: Callable, **kwargs):
        return linear(*args, config=config, init_method=make_init(config), **kwargs)

    return build


def attention_output_init(config: GLMTransformerConfig) -> Callable[[Tensor], None]:
    """Initialiser of linear_proj, [h, h] with gain beta."""
    projection = config.kv_channels * config.num_attention_heads
    return normal_init(xavier_normal_std(projection, config.hidden_size, config.deepnorm_beta))


def feed_forward_init(config: GLMTransformerConfig) -> Callable[[Tensor], None]:
    """Initialiser of linear_fc1, each half [f, h] a matrix by itself, and of linear_fc2, [h, f]."""
    return normal_init(
        xavier_normal_std(config.hidden_size, config.ffn_hidden_size, config.deepnorm_beta)
    )
