"""Sizes and special tokens of a GLM, as config.json holds them."""

from transformers import PreTrainedConfig


class MegatronGLMConfig(PreTrainedConfig):
    """Sizes of a GLM and the ids of its special tokens.

    rotary_angle_dtype: "fp32", or "fp16" for weights that were trained with rotary frequencies,
    angles, cosines and sines rounded to fp16, as the released GLM-130B. mask_token_ids: [MASK] and
    [sMASK]. Without `sop_token_id`, `forward` needs `context_lengths` and `generate` refuses.
    """

    model_type = "megatron_glm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 150528,
        hidden_size: int = 12288,
        num_hidden_layers: int = 70,
        num_attention_heads: int = 96,
        intermediate_size: int = 32768,
        max_position_embeddings: int = 2048,
        layer_norm_eps: float = 1e-5,
        rotary_base: float = 10000.0,
        rotary_angle_dtype: str = "fp32",
        initializer_range: float = 0.0052,
        mask_token_ids: list[int] | None = None,
        gmask_token_id: int | None = None,
        sop_token_id: int | None = None,
        eop_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.layer_norm_eps = layer_norm_eps
        self.rotary_base = rotary_base
        self.rotary_angle_dtype = rotary_angle_dtype
        self.initializer_range = initializer_range
        self.mask_token_ids = mask_token_ids or []
        self.gmask_token_id = gmask_token_id
        self.sop_token_id = sop_token_id
        self.eop_token_id = eop_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
