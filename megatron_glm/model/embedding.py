"""Embedding gradient shrink (paper, section 3.1) and its ramp."""

import torch
from torch import Tensor

from megatron_glm.model.config import GLMArchitecture


def shrink_alpha(config: GLMArchitecture, consumed_samples: int) -> float:
    """Factor on the word embedding's gradient after `consumed_samples` samples of training."""
    final = config.shrink_embedding_gradient_alpha
    initial = config.shrink_embedding_gradient_initial_alpha
    if initial is None:
        return final
    since_start = consumed_samples - config.shrink_embedding_gradient_ramp_start_samples
    if since_start < 0:
        return initial
    ramp = config.shrink_embedding_gradient_ramp_samples
    if since_start >= ramp:
        return final
    return initial + (final - initial) * since_start / ramp


class GradientShrink:
    """Scales the gradient of a weight by `alpha`, leaving the forward pass bit for bit as it is.

    The paper writes the shrink as e * alpha + e.detach() * (1 - alpha) on the embedding; both uses
    of the tied weight scale by the same alpha, so the same gradient comes from scaling the
    weight's own, without rounding the forward.
    """

    def __init__(self, weight: torch.nn.Parameter, alpha: float):
        self.alpha = alpha
        weight.register_hook(self._scale)

    def _scale(self, gradient: Tensor) -> Tensor:
        # Nobody else holds what a linear or an embedding has just made; on the first and the last
        # stage of a large model a copy would be a step's worst moment.
        return gradient if self.alpha == 1.0 else gradient.mul_(self.alpha)
