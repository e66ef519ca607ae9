"""GLM-130B's forward in plain PyTorch: an oracle that shares nothing with the trained model.

Dense masks and one layer's weights at a time, so it is slow, obvious, and runs a checkpoint that
is larger than memory. Architecture: GLM-130B (arXiv 2210.02414), section 2.1.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from megatron_glm.checkpoint.table import Dimensions

LAYERNORM_EPSILON = 1e-5
ROTARY_BASE = 10000

# Returns a whole weight by Megatron name, in Megatron's layout.
ReadWeight = Callable[[str], torch.Tensor]


def prefix_mask(samples: torch.Tensor, seq_length: int) -> torch.Tensor:
    """What each token of each pack sees, bool [b, s, s].

    `samples` is int [b, k, 3]: start, context length and length of each sample; rows of length 0
    are unused. A token sees the context of its sample and what precedes it there, itself included.
    """
    positions = torch.arange(seq_length)
    query, key = positions[:, None], positions[None, :]
    # A token outside all samples sees itself, so that its (unused) softmax is not 0/0.
    mask = torch.eye(seq_length, dtype=torch.bool).repeat(len(samples), 1, 1)
    for pack, rows in zip(mask, samples.tolist(), strict=True):
        for start, context_length, length in rows:
            inside = (start <= query) & (query < start + length)
            inside = inside & (start <= key) & (key < start + length)
            pack |= inside & ((key <= query) | (key < start + context_length))
    return mask


def rotary_tables(
    position_ids: torch.Tensor, head_size: int, angle_dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 cosines and sines [b, 1, s, d] by position id.

    With `angle_dtype` "fp16", frequencies, angles, cosines and sines are each rounded to fp16, as
    in the training of the released GLM-130B; with "fp32" nothing is.
    """
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[angle_dtype]
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = (1.0 / ROTARY_BASE**exponents).to(dtype)
    angles = position_ids.to(dtype)[..., None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates [b, n, s, d] by halves: dimension i with i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@torch.no_grad()
def forward(
    read: ReadWeight,
    dimensions: Dimensions,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    samples: torch.Tensor,
    rotary_angle_dtype: str,
    observe: Callable[[str, torch.Tensor], None] = lambda name, inputs: None,
) -> torch.Tensor:
    """Logits fp32 [b, s, v] of packs of samples, in fp32 arithmetic whatever the weights' type.

    tokens, position_ids: int64 [b, s]; samples: see `prefix_mask`. observe: is shown the inputs
    [b, s, columns] of each linear weight, by name.
    """

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = read(f"{name}.weight").float(), read(f"{name}.bias").float()
        return F.layer_norm(x, x.shape[-1:], weight, bias, LAYERNORM_EPSILON)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        observe(f"{name}.weight", x)
        return F.linear(x, read(f"{name}.weight").float(), read(f"{name}.bias").float())

    n = dimensions.num_attention_heads
    head_size = dimensions.hidden_size // n
    alpha = math.sqrt(2 * dimensions.num_layers)
    mask = prefix_mask(samples, tokens.shape[1])[:, None]
    cos, sin = rotary_tables(position_ids, head_size, rotary_angle_dtype)
    embedding = read("embedding.word_embeddings.weight")
    x = F.embedding(tokens, embedding).float()
    del embedding
    for layer in range(dimensions.num_layers):
        name = f"decoder.layers.{layer}"
        a = layer_norm(x, f"{name}.input_layernorm")
        qkv = linear(a, f"{name}.self_attention.linear_qkv").unflatten(-1, (n, 3, head_size))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        scores = rotate(query, cos, sin) @ rotate(key, cos, sin).mT / math.sqrt(head_size)
        probabilities = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        attention = (probabilities @ value).transpose(1, 2).flatten(2)
        h = alpha * a + linear(attention, f"{name}.self_attention.linear_proj")
        m = layer_norm(h, f"{name}.pre_mlp_layernorm")
        gated, plain = linear(m, f"{name}.mlp.linear_fc1").chunk(2, dim=-1)
        x = alpha * m + linear(F.gelu(gated) * plain, f"{name}.mlp.linear_fc2")
    x = layer_norm(x, "decoder.final_layernorm")
    return F.linear(x, read("embedding.word_embeddings.weight").float())
