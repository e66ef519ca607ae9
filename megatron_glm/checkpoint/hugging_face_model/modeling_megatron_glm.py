"""GLM for transformers: prefix attention, DeepNorm, GeGLU and rotary positions by token.

A sequence is a context, in which all tokens see each other, then one `sop` after another, each
followed by what fills a blank, causally. The k-th `sop` fills the k-th of the context's [MASK],
[sMASK] and [gMASK] tokens: what fills a [MASK] or [sMASK] keeps the position of the mask, what
fills a [gMASK] goes on counting behind the context. `generate` fills all blanks: where the model
ends one (`eop`) and another is left, it goes on with `sop`. GLM-130B: arXiv 2210.02414.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_megatron_glm import MegatronGLMConfig


def context_lengths_of(input_ids: torch.Tensor, sop_token_id: int) -> torch.Tensor:
    """Tokens before the first `sop` of each row, left padding included: int64 [b]."""
    is_sop = input_ids == sop_token_id
    return torch.where(is_sop.any(-1), is_sop.int().argmax(-1), input_ids.shape[1])


def position_ids_of(
    input_ids: torch.Tensor, real: torch.Tensor, config: MegatronGLMConfig
) -> torch.Tensor:
    """Positions int64 [b, s] of whole sequences; `real` is False on padding."""
    index = (real.long().cumsum(-1) - 1).clamp(min=0)
    is_sop = real & (input_ids == config.sop_token_id)
    blank = is_sop.long().cumsum(-1)
    in_context = real & (blank == 0)
    is_gmask = input_ids == config.gmask_token_id
    is_mask = torch.isin(input_ids, input_ids.new_tensor(config.mask_token_ids)) | is_gmask
    # Where the k-th mask and the k-th sop lie; a column past the last stands for "there is none".
    length = input_ids.shape[1]
    columns = torch.arange(length, device=input_ids.device).expand_as(input_ids)
    mask_columns = columns.masked_fill(~(is_mask & in_context), length).sort(-1).values
    sop_columns = columns.masked_fill(~is_sop, length).sort(-1).values
    nth = (blank - 1).clamp(min=0)
    mask_column, sop_column = mask_columns.gather(-1, nth), sop_columns.gather(-1, nth)
    at_mask = mask_column.clamp(max=length - 1)
    goes_on = (mask_column == length) | is_gmask.gather(-1, at_mask)
    behind = in_context.long().sum(-1, keepdim=True) + columns - sop_column
    filling = torch.where(goes_on, behind, index.gather(-1, at_mask))
    return torch.where(in_context | ~real, index, filling)


class Rotary:
    """Tables of cosines and sines, gathered by position: rounding to fp16 survives compilers."""

    def __init__(self, config: MegatronGLMConfig):
        self.config = config
        self.tables: torch.Tensor | None = None

    def __call__(self, position_ids: torch.Tensor, num_positions: int) -> torch.Tensor:
        tables = self.tables
        if (
            tables is None
            or tables.shape[1] < num_positions
            or (tables.device != position_ids.device)
        ):
            size = max(num_positions, self.config.max_position_embeddings)
            self.tables = tables = self.build(size).to(position_ids.device)
        return tables[:, position_ids, None].transpose(2, 3)

    def build(self, num_positions: int) -> torch.Tensor:
        """fp32 [2, positions, d]."""
        d = self.config.hidden_size // self.config.num_attention_heads
        dtype = torch.float16 if self.config.rotary_angle_dtype == "fp16" else torch.float32
        exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
        frequencies = (1.0 / self.config.rotary_base**exponents).to(dtype)
        angles = torch.arange(num_positions).to(dtype)[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    cos, sin = tables
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class MegatronGLMAttention(nn.Module):
    def __init__(self, config: MegatronGLMConfig, layer_idx: int):
        super().__init__()
        self.num_heads, self.layer_idx = config.num_attention_heads, layer_idx
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, tables, mask, cache):
        # Rows are grouped by head: [q, k, v] of the first one, of the second one ...
        qkv = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, -1))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        query, key = rotate(query, tables), rotate(key, tables)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MegatronGLMMLP(nn.Module):
    def __init__(self, config: MegatronGLMConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.gelu(gate) * up)


class MegatronGLMDecoderLayer(nn.Module):
    def __init__(self, config: MegatronGLMConfig, layer_idx: int):
        super().__init__()
        self.alpha = (2 * config.num_hidden_layers) ** 0.5
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = MegatronGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MegatronGLMMLP(config)

    def forward(self, x, tables, mask, cache):
        x = self.input_layernorm(x)
        x = self.alpha * x + self.self_attn(x, tables, mask, cache)
        x = self.post_attention_layernorm(x)
        return self.alpha * x + self.mlp(x)


class MegatronGLMPreTrainedModel(PreTrainedModel):
    # No _supports_attention_backend: engines that swap in their own attention, all of them causal,
    # refuse this model instead of running it wrong.
    config: MegatronGLMConfig
    config_class = MegatronGLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["MegatronGLMDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class MegatronGLMModel(MegatronGLMPreTrainedModel):
    def __init__(self, config: MegatronGLMConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MegatronGLMDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.rotary = Rotary(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        context_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [b, s, h].

        input_ids: int64 [b, s], behind what the cache holds. attention_mask: [b, cached + s], 0 on
        left padding, or bool [b, 1, s, s] for any other pattern. context_lengths: int64 [b], tokens
        before the first `sop`, padding included; found in `input_ids` by default. position_ids:
        needed with a filled cache, otherwise found in `input_ids`.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError(
                "this model keeps its cache as it grows: use cache_implementation None"
            )
        if past and position_ids is None:
            raise ValueError("position_ids are needed with a filled cache; generate() makes them")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is None or attention_mask.dim() == 2:
            real = attention_mask
            if context_lengths is None and not past:
                context_lengths = self._context_lengths(input_ids)
            attention_mask = self._visible(input_ids, real, past, context_lengths)
            if position_ids is None and self.config.sop_token_id is not None:
                real = torch.ones_like(input_ids) if real is None else real
                position_ids = position_ids_of(input_ids, real.bool(), self.config)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        tables = self.rotary(position_ids, past + input_ids.shape[1])
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, tables.to(x.device), attention_mask, past_key_values)
        return BaseModelOutputWithPast(self.norm(x), past_key_values if use_cache else None)

    def _context_lengths(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.config.sop_token_id is None:
            raise ValueError("config.sop_token_id is not set: give context_lengths")
        return context_lengths_of(input_ids, self.config.sop_token_id)

    def _visible(self, input_ids, real, past, context_lengths) -> torch.Tensor | None:
        """bool [b, 1, s, past + s], None where every token sees every key."""
        length = input_ids.shape[1]
        if past and length == 1:
            return None if real is None else real.bool()[:, None, None]
        keys = torch.arange(past + length, device=input_ids.device)
        queries = keys[past:, None]
        visible = (keys <= queries)[None]
        if not past:
            visible = visible | (keys < context_lengths[:, None])[:, None]
        if real is not None:
            # Padding sees itself, so that its softmax is not 0/0.
            visible = (visible & real.bool()[:, None]) | (keys == queries)
        return visible[:, None]


class FillNextBlank(LogitsProcessor):
    """Turns the end of one blank into the start of the next, as long as the context has more."""

    def __init__(self, config: MegatronGLMConfig):
        self.config = config

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sop, eop = self.config.sop_token_id, self.config.eop_token_id
        masks = input_ids.new_tensor([*self.config.mask_token_ids, self.config.gmask_token_id])
        columns = torch.arange(input_ids.shape[1], device=input_ids.device)
        in_context = columns < context_lengths_of(input_ids, sop)[:, None]
        blanks = (torch.isin(input_ids, masks) & in_context).sum(-1)
        more = blanks > (input_ids == sop).sum(-1)
        scores = scores.clone()
        scores[:, sop] = torch.where(more, scores[:, eop], -torch.inf)
        scores[:, eop] = torch.where(more, -torch.inf, scores[:, eop])
        return scores


class MegatronGLMForCausalLM(MegatronGLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MegatronGLMConfig):
        super().__init__(config)
        self.model = MegatronGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        context_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [b, s, v]; see `MegatronGLMModel.forward`. labels: int64 [b, s], shifted here by
        one as everywhere in transformers, -100 where there is no target (in the context)."""
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, use_cache, context_lengths
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **kwargs
    ):
        # `input_ids` holds everything so far: positions follow from all of it, not by counting.
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        position_ids = position_ids_of(input_ids, real.bool(), self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not past and not (input_ids == self.config.sop_token_id).any(-1).all():
            raise ValueError("the context must be read at once: leave prefill_chunk_size unset")
        return {
            "input_ids": input_ids[:, past:].contiguous(),
            "position_ids": position_ids[:, past:].contiguous(),
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    @torch.no_grad()
    def generate(self, inputs=None, *args, logits_processor=None, **kwargs):
        """Fills the blanks of prompts that end in `sop`, as the tokenizer makes them; otherwise as
        GenerationMixin.generate."""
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if self.config.sop_token_id is None:
            raise ValueError("config.sop_token_id is not set: this export came without a tokenizer")
        if input_ids is None or not (input_ids == self.config.sop_token_id).any(-1).all():
            raise ValueError(
                f"a prompt has no sop (id {self.config.sop_token_id}), after which the model fills "
                "blanks; the tokenizer appends it"
            )
        processors = LogitsProcessorList([*(logits_processor or []), FillNextBlank(self.config)])
        return super().generate(inputs, *args, logits_processor=processors, **kwargs)
