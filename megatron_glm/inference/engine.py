"""GLM's forward for inference, in plain torch: one stage of a pipeline, one tensor parallel shard.

The context of a row (everything before its first `sop`) is read at once by attention without a
mask, since every token of it sees every other; from `sop` on a token a step is appended, which
sees all that its row holds. So there is never an s x s mask. GLM-130B (arXiv 2210.02414), section
2.1; names of weights are Megatron's.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_glm.checkpoint.reference import LAYERNORM_EPSILON, ROTARY_BASE
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.inference.kv_cache import KVCache
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.step_graphs import StepGraphs
from megatron_glm.inference.weights import Weights
from megatron_glm.model.rotary import RotaryTable, rotate

# Tokens that are read at a time, for activations to stay small beside the weights.
PREFILL_TOKENS = 8192
# Not cuDNN, which torch prefers on Hopper and Blackwell: it plans anew for every length.
PREFILL_ATTENTION = [
    SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip


class Norm:
    """Layer normalisation."""

    def __init__(self, weights: Weights, name: str):
        self.weight, self.bias = weights(f"{name}.weight"), weights(f"{name}.bias")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, LAYERNORM_EPSILON)


# Attention of one layer: query, key and value, not yet rotated, [t, n, 3, d] to [t, n, d].
Attend = Callable[[torch.Tensor], torch.Tensor]


class Layer:
    """One layer, n and f being this rank's share: a = LN(x); h = alpha * a + attention(a);
    m = LN(h); alpha * m + MLP(m)."""

    def __init__(self, weights: Weights, number: int, layout: Layout):
        name = f"decoder.layers.{number}"
        dimensions = weights.source.settings.dimensions
        self.layout = layout
        self.head_dim = dimensions.hidden_size // dimensions.num_attention_heads
        self.alpha = math.sqrt(2 * dimensions.num_layers)
        self.input_norm = Norm(weights, f"{name}.input_layernorm")
        self.mlp_norm = Norm(weights, f"{name}.pre_mlp_layernorm")
        self.qkv = weights.linear(f"{name}.self_attention.linear_qkv")
        # One rank adds the bias of a row-parallel product: the sum then holds it once.
        own_bias = layout.tp_rank == 0
        self.proj = weights.linear(f"{name}.self_attention.linear_proj", own_bias)
        self.fc1 = weights.linear(f"{name}.mlp.linear_fc1")
        self.fc2 = weights.linear(f"{name}.mlp.linear_fc2", own_bias)

    @property
    def num_weight_bytes(self) -> int:
        """Memory of the linear layers' weights."""
        return sum(part.num_bytes for part in (self.qkv, self.proj, self.fc1, self.fc2))

    def __call__(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states [t, h] to the same."""
        a = self.input_norm(x)
        qkv = self.qkv(a).unflatten(-1, (-1, 3, self.head_dim))
        attention = attend(qkv).flatten(1)
        h = self.layout.reduce(self.proj(attention)).add_(a, alpha=self.alpha)
        m = self.mlp_norm(h)
        gated, plain = self.fc1(m).chunk(2, dim=-1)
        return self.layout.reduce(self.fc2(F.gelu(gated).mul_(plain))).add_(m, alpha=self.alpha)


class Engine:
    """One rank's part of a GLM, and the rows that it is generating.

    weights: this rank's part of the checkpoint. All ranks of a layout call the same methods with
    the same arguments. graphs: what replays steps of decode, None on a CPU.
    """

    def __init__(self, settings: Settings, weights: Weights, layout: Layout):
        dimensions = settings.dimensions
        self.settings, self.layout = settings, layout
        self.head_dim = dimensions.hidden_size // dimensions.num_attention_heads
        self.num_heads = dimensions.num_attention_heads // layout.tp_size
        self.dtype, self.device = weights.dtype, weights.device
        self._rotary = RotaryTable(
            settings.seq_length, self.head_dim, ROTARY_BASE, settings.rotary_angle_dtype
        )
        self.layers = [
            Layer(weights, number, layout) for number in layout.layers(dimensions.num_layers)
        ]
        self._embedding = None
        if layout.is_first_stage or layout.is_last_stage:
            self._embedding = weights("embedding.word_embeddings.weight")
        if layout.is_last_stage:
            self._final_norm = Norm(weights, "decoder.final_layernorm")
        self.cache = self.new_cache()
        self.graphs = None if self.device.type == "cpu" else StepGraphs(self.device)

    def new_cache(self) -> KVCache:
        """A cache without rows for this rank's layers and heads."""
        return KVCache(len(self.layers), self.num_heads, self.head_dim, self.dtype, self.device)

    @property
    def num_weight_bytes(self) -> int:
        """Memory of this rank's weights, scales included."""
        embedding = 0 if self._embedding is None else self._embedding.nbytes
        return embedding + sum(layer.num_weight_bytes for layer in self.layers)

    @torch.inference_mode()
    def prefill(self, contexts: Sequence[Sequence[int]]) -> None:
        """Reads contexts, each into a new row behind the others; position i is token i's.

        Contexts travel end to end without padding, `PREFILL_TOKENS` or one context at a time.
        Their logits are nobody's: what fills a blank begins with `sop`, the first step of `decode`.
        """
        start, size = 0, 0
        for end, context in enumerate(contexts):
            if size and size + len(context) > PREFILL_TOKENS:
                self._prefill(contexts[start:end])
                start, size = end, 0
            size += len(context)
        self._prefill(contexts[start:])

    def _prefill(self, contexts: Sequence[Sequence[int]]) -> None:
        lengths = [len(context) for context in contexts]
        first_row = self.cache.num_rows
        self.cache.add_rows(lengths)
        runs = _equal_runs(first_row, lengths)

        def attend(layer, rotation, qkv):
            query, key, value = _rotated(qkv, rotation)
            out = torch.empty_like(query)
            for row, tokens, length in runs:
                q, k, v = (
                    x[tokens].unflatten(0, (-1, length)).transpose(1, 2)
                    for x in (query, key, value)
                )
                self.cache.write_rows(layer, row, k, v)
                result = F.scaled_dot_product_attention(q, k, v)
                out[tokens] = result.transpose(1, 2).flatten(0, 1)
            return out

        tokens = torch.tensor([token for context in contexts for token in context])
        positions = torch.cat([torch.arange(length) for length in lengths])
        with sdpa_kernel(PREFILL_ATTENTION):
            self._forward(tokens.to(self.device), positions.to(self.device), attend)

    @torch.inference_mode()
    def decode(self, tokens: Sequence[int], position_ids: Sequence[int]) -> torch.Tensor:
        """Appends a token to every row of the cache; returns logits fp32 [rows, v] of the next,
        which on a GPU the next step overwrites."""
        inputs = [tokens, position_ids, self.cache.add_tokens()]
        if self.graphs is None:
            return self._step(torch.tensor(inputs))
        return self.graphs(self._step, inputs, self.cache.memory)

    def _step(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: tokens, position ids, and where the tokens go in their rows of the cache."""
        tokens, position_ids, places = inputs
        attend = self._attend_by_mask if self.graphs is None else self._attend_by_kernel
        return self._logits(self._forward(tokens, position_ids, attend(places)))

    def _attend_by_kernel(self, places: torch.Tensor) -> Callable[..., torch.Tensor]:
        from megatron_glm.inference.decode_attention import attend

        return lambda layer, rotation, qkv: attend(
            qkv, rotation, places, *self.cache.layer(layer)
        )

    def _attend_by_mask(self, places: torch.Tensor) -> Callable[..., torch.Tensor]:
        mask = None
        longest = max(self.cache.lengths)
        if min(self.cache.lengths) < longest:
            # [rows, 1, 1, tokens]: where rows end.
            mask = torch.arange(longest) <= places[:, None, None, None]

        def attend(layer, rotation, qkv):
            query, key, value = _rotated(qkv, rotation)
            keys, values = self.cache.append(layer, places, key, value)
            return F.scaled_dot_product_attention(
                query[:, :, None], keys, values, attn_mask=mask
            )[:, :, 0]

        return attend

    def _forward(
        self, tokens: torch.Tensor, position_ids: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """Hidden states [t, h] behind this stage's layers for tokens [t] at positions [t].

        attend: an `Attend` that takes the layer's number within the stage and the tokens' rotation,
        fp32 [t, 1, 1, d], first."""
        rotation = self._rotary(position_ids[None])
        if self.layout.is_first_stage:
            x = self._embed(tokens)
        else:
            shape = (len(tokens), self.settings.dimensions.hidden_size)
            x = self.layout.receive(torch.empty(shape, dtype=self.dtype, device=self.device))
        for number, layer in enumerate(self.layers):
            x = layer(x, partial(attend, number, rotation))
        if not self.layout.is_last_stage:
            self.layout.send(x)
        return x

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.layout.tp_size == 1:
            return F.embedding(tokens, self._embedding)
        share = len(self._embedding)
        local = tokens - self.layout.tp_rank * share
        is_here = (local >= 0) & (local < share)
        x = F.embedding(local.clamp(0, share - 1), self._embedding)
        return self.layout.reduce(x * is_here[:, None])

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout.is_last_stage:
            part = F.linear(self._final_norm(x), self._embedding).float()
            logits = self.layout.gather_last_dim(part)
        else:
            shape = (len(x), self.settings.dimensions.vocab_size)
            logits = torch.empty(shape, dtype=torch.float32, device=self.device)
        return self.layout.from_last_stage(logits)


def _rotated(
    qkv: torch.Tensor, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query and key, turned in fp32, and value, each [t, n, d]."""
    query, key = rotate(qkv[:, :, :2].float(), rotation).to(qkv.dtype).unbind(2)
    return query, key, qkv[:, :, 2]


def _equal_runs(first_row: int, lengths: Sequence[int]) -> list[tuple[int, slice, int]]:
    """Neighbouring rows of equal length: first row, where their tokens lie in the pack, length."""
    runs, row, token = [], first_row, 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append((row, slice(token, token + count * length), length))
        row, token = row + count, token + count * length
    return runs
