"""The one table of GLM's weights: a row a tensor, its name in each format, its shape, its split.

Everything that reads or writes a checkpoint goes through it, in one direction or the other. A
tensor in the middle of its way is whole, under its Megatron name and in Megatron's layout.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from typing import NamedTuple

import torch

from megatron_glm.checkpoint.errors import ShapeError, UnknownTensorError


class Format(Enum):
    """Whose names and whose order of rows."""

    MEGATRON = "megatron"
    SAT = "sat"
    HUGGING_FACE = "hf"


class Transform(Enum):
    """What has to hold together when a tensor is split, and how formats order it."""

    NONE = "any row or column may go to any rank"
    HEADS = "whole heads of [q, k, v] rows; the same order in all formats"
    GEGLU = "[gated; linear] halves, each split by itself; SAT stores [linear; gated]"


class Row(NamedTuple):
    """A kind of tensor. `{}` in a name stands for the layer, letters in `shape` for a size:
    v padded vocabulary, h hidden size, f FFN size. `split` is the dimension that tensor
    parallelism splits, None where every rank holds the whole."""

    megatron: str
    sat: str
    hugging_face: str
    shape: tuple[str, ...]
    split: int | None = None
    transform: Transform = Transform.NONE
    quantizable: bool = False

    def pattern(self, fmt: Format) -> str:
        """Its name in a format, with `{}` for the layer."""
        return getattr(self, fmt.name.lower())

    @property
    def in_layer(self) -> bool:
        """True for a tensor that every layer has."""
        return "{}" in self.megatron


# fmt: off
# In the order in which SAT writes them.
TABLE = (
    Row("embedding.word_embeddings.weight", "transformer.word_embeddings.weight",
        "model.embed_tokens.weight", ("v", "h"), split=0),
    Row("decoder.layers.{}.input_layernorm.weight", "transformer.layers.{}.input_layernorm.weight",
        "model.layers.{}.input_layernorm.weight", ("h",)),
    Row("decoder.layers.{}.input_layernorm.bias", "transformer.layers.{}.input_layernorm.bias",
        "model.layers.{}.input_layernorm.bias", ("h",)),
    Row("decoder.layers.{}.self_attention.linear_qkv.weight",
        "transformer.layers.{}.attention.query_key_value.weight",
        "model.layers.{}.self_attn.query_key_value.weight",
        ("3h", "h"), split=0, transform=Transform.HEADS, quantizable=True),
    Row("decoder.layers.{}.self_attention.linear_qkv.bias",
        "transformer.layers.{}.attention.query_key_value.bias",
        "model.layers.{}.self_attn.query_key_value.bias",
        ("3h",), split=0, transform=Transform.HEADS),
    Row("decoder.layers.{}.self_attention.linear_proj.weight",
        "transformer.layers.{}.attention.dense.weight",
        "model.layers.{}.self_attn.o_proj.weight", ("h", "h"), split=1, quantizable=True),
    Row("decoder.layers.{}.self_attention.linear_proj.bias",
        "transformer.layers.{}.attention.dense.bias",
        "model.layers.{}.self_attn.o_proj.bias", ("h",)),
    Row("decoder.layers.{}.pre_mlp_layernorm.weight",
        "transformer.layers.{}.post_attention_layernorm.weight",
        "model.layers.{}.post_attention_layernorm.weight", ("h",)),
    Row("decoder.layers.{}.pre_mlp_layernorm.bias",
        "transformer.layers.{}.post_attention_layernorm.bias",
        "model.layers.{}.post_attention_layernorm.bias", ("h",)),
    Row("decoder.layers.{}.mlp.linear_fc2.weight", "transformer.layers.{}.mlp.dense_4h_to_h.weight",
        "model.layers.{}.mlp.down_proj.weight", ("h", "f"), split=1, quantizable=True),
    Row("decoder.layers.{}.mlp.linear_fc2.bias", "transformer.layers.{}.mlp.dense_4h_to_h.bias",
        "model.layers.{}.mlp.down_proj.bias", ("h",)),
    Row("decoder.layers.{}.mlp.linear_fc1.weight", "transformer.layers.{}.mlp.dense_h_to_4h.weight",
        "model.layers.{}.mlp.gate_up_proj.weight",
        ("2f", "h"), split=0, transform=Transform.GEGLU, quantizable=True),
    Row("decoder.layers.{}.mlp.linear_fc1.bias", "transformer.layers.{}.mlp.dense_h_to_4h.bias",
        "model.layers.{}.mlp.gate_up_proj.bias", ("2f",), split=0, transform=Transform.GEGLU),
    Row("decoder.final_layernorm.weight", "transformer.final_layernorm.weight",
        "model.norm.weight", ("h",)),
    Row("decoder.final_layernorm.bias", "transformer.final_layernorm.bias",
        "model.norm.bias", ("h",)),
)
# fmt: on


@dataclass(frozen=True)
class Dimensions:
    """The sizes that decide every shape of the table; `vocab_size` is the padded one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ShapeError(f"{name} {value}: must be positive")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ShapeError(
                f"num_attention_heads {self.num_attention_heads}: must divide hidden_size "
                f"{self.hidden_size} into heads of an even size"
            )

    @cached_property
    def sizes(self) -> dict[str, int]:
        """What the letters of the table's shapes stand for."""
        h, f = self.hidden_size, self.ffn_hidden_size
        return {"v": self.vocab_size, "h": h, "3h": 3 * h, "f": f, "2f": 2 * f}


class Tensor(NamedTuple):
    """One tensor of a model: a row of the table and, inside a layer, the layer's number from 0."""

    row: Row
    layer: int | None

    def name(self, fmt: Format) -> str:
        """Its name in a format."""
        return self.row.pattern(fmt).format(self.layer)

    def shape(self, dimensions: Dimensions) -> tuple[int, ...]:
        """Its full shape, the same in all formats."""
        return tuple(dimensions.sizes[letter] for letter in self.row.shape)


def tensors(dimensions: Dimensions) -> Iterator[Tensor]:
    """All tensors of a model, layer by layer."""
    first_in_layer = next(i for i, row in enumerate(TABLE) if row.in_layer)
    last_in_layer = max(i for i, row in enumerate(TABLE) if row.in_layer)
    for row in TABLE[:first_in_layer]:
        yield Tensor(row, None)
    for layer in range(dimensions.num_layers):
        for row in TABLE[first_in_layer : last_in_layer + 1]:
            yield Tensor(row, layer)
    for row in TABLE[last_in_layer + 1 :]:
        yield Tensor(row, None)


@cache
def _rows_by_pattern(fmt: Format) -> dict[str, Row]:
    return {row.pattern(fmt): row for row in TABLE}


def find(fmt: Format, name: str) -> Tensor:
    """The tensor that a format calls `name`; UnknownTensorError for a name not in the table."""
    rows = _rows_by_pattern(fmt)
    if name in rows and "{}" not in name:
        return Tensor(rows[name], None)
    match = re.search(r"(?<=\.layers\.)(0|[1-9][0-9]*)(?=\.)", name)
    if match:
        row = rows.get(name[: match.start()] + "{}" + name[match.end() :])
        if row is not None:
            return Tensor(row, int(match.group()))
    raise UnknownTensorError(f"{name}: not a tensor of GLM under its {fmt.value} names")


def check_tensor_parallel_size(dimensions: Dimensions, tp_size: int) -> None:
    """ShapeError unless `tp_size` ranks can hold equal shares of every tensor, in whole heads."""
    for size in ("num_attention_heads", "ffn_hidden_size", "vocab_size"):
        if tp_size < 1 or getattr(dimensions, size) % tp_size:
            raise ShapeError(
                f"tensor parallel size {tp_size}: must divide {size} {getattr(dimensions, size)}"
            )


def regions(row: Row, fmt: Format, size: int, tp_rank: int, tp_size: int) -> list[slice]:
    """Which ranges of the split dimension, `size` long, rank `tp_rank` of `tp_size` holds, in the
    order in which the format stores them."""
    halves = 2 if row.transform is Transform.GEGLU else 1
    if size % (halves * tp_size):
        raise ShapeError(
            f"{row.pattern(fmt)}: {size} entries do not split into {halves} x {tp_size} equal parts"
        )
    half, share = size // halves, size // halves // tp_size
    order = reversed(range(halves)) if fmt is Format.SAT else range(halves)
    return [slice(h * half + tp_rank * share, h * half + (tp_rank + 1) * share) for h in order]


def parts(
    row: Row, whole: torch.Tensor, fmt: Format, tp_rank: int, tp_size: int
) -> list[torch.Tensor]:
    """The views of a whole tensor in Megatron's layout that make up a rank's part, in the order in
    which the format stores them along the split dimension; the whole where nothing is split."""
    if row.split is None:
        return [whole]
    return [
        whole.narrow(row.split, region.start, region.stop - region.start)
        for region in regions(row, fmt, whole.shape[row.split], tp_rank, tp_size)
    ]


def shard(
    megatron_name: str,
    whole: torch.Tensor,
    tp_rank: int,
    tp_size: int,
    fmt: Format = Format.MEGATRON,
) -> torch.Tensor:
    """Rank `tp_rank`'s part of a whole tensor in Megatron's layout, as `fmt` stores it: a view
    where the part is one range, a copy where it is two."""
    row = find(Format.MEGATRON, megatron_name).row
    pieces = parts(row, whole, fmt, tp_rank, tp_size)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, row.split)


def shard_shape(tensor: Tensor, dimensions: Dimensions, tp_size: int) -> tuple[int, ...]:
    """The shape of one rank's part."""
    shape = list(tensor.shape(dimensions))
    if tensor.row.split is not None:
        shape[tensor.row.split] //= tp_size
    return tuple(shape)
