"""What a conversion is to write: the rules across formats, and the writer that follows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.hugging_face_writer import (
    ExportedTokenizer,
    GroupedQuantization,
    HuggingFaceWriter,
)
from megatron_glm.checkpoint.sat_writer import SATWriter
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import TABLE, Dimensions, Format, Tensor


@dataclass(frozen=True)
class Request:
    """What was asked for; None where the source decides. Fields are the flags of
    tools/convert_checkpoint.py."""

    fmt: Format
    target_tp: int | None = None
    quantization_bit_width: int | None = None
    quantization_group_size: int | None = None
    dtype: torch.dtype | None = None
    iteration: int | None = None


@dataclass(frozen=True)
class Target:
    """A checkpoint to be. `write(folder, read)` writes it, calling `read` once a tensor.

    dtype: of plain weights; bits: of quantised ones, None where there are none; scales: scales a
    row of these, by Megatron's pattern. description: for conversion.json.
    """

    write: Callable[[Path, Callable[[Tensor], Any]], None]
    num_bytes: int
    dtype: torch.dtype
    bits: int | None
    scales: dict[str, int]
    description: dict[str, Any]


def plan_target(
    request: Request, source: Source, settings: Settings, tokenizer: ExportedTokenizer | None
) -> Target:
    """The target of a request; CheckpointError names the flag that the source cannot honour."""
    bits = _bits(request, source)
    default = torch.float16 if request.fmt is Format.SAT else source.dtype
    dtype = request.dtype or default
    if request.fmt is not Format.SAT and request.target_tp is not None:
        raise CheckpointError(
            f"--target-tp {request.target_tp}: only SAT checkpoints are split by tensor parallel "
            f"rank; drop the flag, a {request.fmt.value} checkpoint loads at any size"
        )
    if request.fmt is not Format.HUGGING_FACE and request.quantization_group_size is not None:
        raise CheckpointError(
            f"--quantization-group-size {request.quantization_group_size}: only Hugging Face "
            "checkpoints have groups; drop the flag"
        )
    if request.quantization_group_size is not None and bits is None:
        raise CheckpointError(
            f"--quantization-group-size {request.quantization_group_size}: nothing is quantised; "
            "give --quantization-bit-width 8 or 4 too, or drop the flag"
        )
    make = {
        Format.SAT: _sat, Format.HUGGING_FACE: _hugging_face, Format.MEGATRON: _megatron,
    }[request.fmt]  # fmt: skip
    return make(request, source, settings, tokenizer, dtype, bits)


def _bits(request: Request, source: Source) -> int | None:
    asked = request.quantization_bit_width
    if asked and request.fmt is Format.MEGATRON:
        raise CheckpointError(
            f"--quantization-bit-width {asked}: Megatron trains plain weights; drop the flag"
        )
    if source.bits is None:
        return asked
    if request.dtype is not None and asked is None:
        return None
    if asked not in (None, source.bits) or request.dtype is not None:
        raise CheckpointError(
            f"--quantization-bit-width {asked}: {source.directory} is INT{source.bits} already, "
            "and quantising twice loses more than once; convert the fp16 checkpoint"
        )
    if request.fmt is Format.MEGATRON:
        raise CheckpointError(
            f"{source.directory}: holds INT{source.bits} weights, which lost what training needs; "
            "convert the fp16 checkpoint, or give --dtype to go on from dequantised weights"
        )
    return source.bits


def _sat(request, source, settings, tokenizer, dtype, bits) -> Target:
    tp = request.target_tp or getattr(source, "tp_size", 1)
    writer = SATWriter(settings, tp, dtype, bits)
    scales = {row.megatron: tp if row.split == 1 else 1 for row in TABLE if row.quantizable}
    if bits and source.bits and source.scales != scales:
        raise CheckpointError(
            f"--target-tp {tp}: {source.directory} holds INT{bits} weights whose rows were "
            "quantised in other parts (a scale belongs to one shard's part of a row), so shards "
            "cannot be merged or split without other codes. Keep its split, or convert the fp16 "
            f"checkpoint with --quantization-bit-width {bits}"
        )
    iteration = source.iteration if request.iteration is None else request.iteration
    description = {"tensor_parallel_size": tp, "iteration": iteration}
    return Target(
        lambda folder, read: writer.write(folder, iteration, read),
        writer.num_bytes, dtype, bits, scales, _describe(Format.SAT, dtype, bits, description),
    )  # fmt: skip


def _hugging_face(request, source, settings, tokenizer, dtype, bits) -> Target:
    quantization, scales = None, {}
    if bits:
        group_size = request.quantization_group_size
        if source.bits and group_size is not None:
            raise CheckpointError(
                f"--quantization-group-size {group_size}: {source.directory} is quantised already, "
                "and keeps its scales; convert the fp16 checkpoint"
            )
        columns = _columns(settings.dimensions)
        if source.bits:
            scales = source.scales
        else:
            for name, size in columns.items():
                if group_size is not None and (group_size < 1 or size % group_size):
                    raise CheckpointError(
                        f"--quantization-group-size {group_size}: must divide the {size} columns "
                        f"of {name}"
                    )
            scales = {k: size // group_size if group_size else 1 for k, size in columns.items()}
        quantization = GroupedQuantization(
            bits, {k: columns[k] // n if n > 1 else None for k, n in scales.items()}
        )
    writer = HuggingFaceWriter(settings, dtype, quantization, tokenizer)
    description: dict[str, Any] = {}
    if bits:
        description["quantization_group_size"] = request.quantization_group_size
    if tokenizer is not None:
        description["tokenizer_sha256"] = tokenizer.sha256
    return Target(
        writer.write, writer.num_bytes, dtype, bits, scales,
        _describe(Format.HUGGING_FACE, dtype, bits, description),
    )  # fmt: skip


def _megatron(request, source, settings, tokenizer, dtype, bits) -> Target:
    # Imports torch.distributed.checkpoint, which takes longer than all else here.
    from megatron_glm.checkpoint.megatron_writer import MegatronWriter

    args = getattr(source, "args", None)
    writer = MegatronWriter(settings, dtype, request.iteration, args)
    description = {"iteration": request.iteration or 0, "release": request.iteration is None}
    return Target(
        writer.write, writer.num_bytes, dtype, None, {},
        _describe(Format.MEGATRON, dtype, None, description),
    )  # fmt: skip


def _columns(dimensions: Dimensions) -> dict[str, int]:
    return {row.megatron: dimensions.sizes[row.shape[1]] for row in TABLE if row.quantizable}


def _describe(fmt: Format, dtype: torch.dtype, bits: int | None, more: dict) -> dict[str, Any]:
    return {
        "format": fmt.value,
        "dtype": str(dtype).removeprefix("torch."),
        "quantization_bit_width": bits,
        **more,
    }
