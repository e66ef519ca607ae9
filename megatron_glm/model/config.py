"""The architecture of GLM as configuration: what a flag, a checkpoint and a module agree on."""

import argparse
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.training.models import GPTModelConfig

from megatron_glm.errors import GLMError, flag_of


@dataclass
class GLMArchitecture:
    """GLM-130B's architecture (arXiv 2210.02414, section 2.1 and table 11)."""

    deepnorm: bool = field(
        default=True, metadata={"argparse_meta": {"arg_names": ["--deepnorm"],
                                                  "action": argparse.BooleanOptionalAction}}
    )
    """Post-LN with the residual LN(x) scaled by alpha = (2 * num_layers) ** 0.5 and DeepNorm's
    initialisation. The only residual that this model has: --no-deepnorm is refused."""

    glu_activation: Literal["geglu"] = "geglu"
    """Gated activation of the MLP: geglu is gelu(x1) * x2 with the exact (erf) GELU."""

    rotary_angle_dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision in which rotary angles are computed. The released GLM-130B was trained with fp16
    angles and needs them; a new run wants fp32. Stored in checkpoints and compared on load."""

    shrink_embedding_gradient_alpha: float = 0.1
    """Factor on the gradient of the word embedding (input and tied logits alike), in (0, 1]; 1
    leaves it alone. Cures early loss spikes (paper, section 3.1)."""

    shrink_embedding_gradient_initial_alpha: float | None = None
    """Factor before the ramp, in (0, 1]; the default is --shrink-embedding-gradient-alpha itself,
    which makes the factor constant."""

    shrink_embedding_gradient_ramp_start_samples: int = 0
    """Consumed samples at which the factor leaves its initial value."""

    shrink_embedding_gradient_ramp_samples: int = 0
    """Samples over which the factor goes linearly to --shrink-embedding-gradient-alpha; 0 is a
    step."""

    glm_attention_backend: str = "auto"
    """Implementation of prefix attention: auto, or one of the backends that the conformance check
    at start names."""

    glm_fused_kernels: bool = field(
        default=True, metadata={"argparse_meta": {"arg_names": ["--glm-fused-kernels"],
                                                  "action": argparse.BooleanOptionalAction}}
    )
    """Run what lies between matrix products in Triton kernels that pass over memory once each way,
    where the model is on a GPU. Without it, and on a CPU, torch's own operations run."""

    glm_recompute_norms_and_geglu: bool = False
    """Make the outputs of norms and GeGLU, which linears take, again in the backward pass instead
    of keeping them: a quarter to a third of what a layer keeps, for a pass over memory each."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose linears the layers are made of: Megatron's own, or Transformer Engine's where it is
    installed. Attention, norms and rotary positions are GLM's own with either, and checkpoints
    pass from one to the other. Not taken by itself: which is faster has not been measured yet."""

    def __post_init__(self):
        if not self.deepnorm:
            raise GLMError(
                "--no-deepnorm: this model has no other residual than DeepNorm's; leave it on"
            )
        for flag in ("alpha", "initial_alpha"):
            name = f"shrink_embedding_gradient_{flag}"
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise GLMError(
                    f"{flag_of(name)} {value}: must lie in (0, 1]; 1 turns the shrink off"
                )
        for flag in ("ramp_start_samples", "ramp_samples"):
            name = f"shrink_embedding_gradient_{flag}"
            if (value := getattr(self, name)) < 0:
                raise GLMError(f"{flag_of(name)} {value}: must be 0 or more")


@dataclass
class GLMTransformerConfig(GLMArchitecture, TransformerConfig):
    """TransformerConfig of a GLM; fields named like flags are filled from them by Megatron."""

    # Megatron waits for the whole device after each exchange between stages, for a race that torch
    # had before 1.13 (https://github.com/pytorch/pytorch/pull/82450), and has no flag for it.
    batch_p2p_sync: bool = False

    def __post_init__(self):
        GLMArchitecture.__post_init__(self)
        self.gated_linear_unit = True
        self.activation_func = F.gelu
        # Megatron's fused bias-GeGLU computes the tanh form of the GELU, 0.011 off in the logits.
        self.bias_activation_fusion = False
        TransformerConfig.__post_init__(self)

    @property
    def deepnorm_alpha(self) -> float:
        """Scale of the residual: (2 * num_layers) ** 0.5."""
        return (2 * self.num_layers) ** 0.5

    @property
    def deepnorm_beta(self) -> float:
        """Xavier gain of v, attention output and FFN matrices: (2 * num_layers) ** -0.5."""
        return (2 * self.num_layers) ** -0.5


@dataclass(kw_only=True)
class GLMModelConfig(GPTModelConfig):
    """GPTModelConfig that builds a GLMModel; adds no field, so Megatron can fill it from flags."""

    builder: ClassVar[str] = "megatron_glm.model.glm_model.GLMModelBuilder"
    transformer: GLMTransformerConfig
