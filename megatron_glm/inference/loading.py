"""From an opened checkpoint and a tokenizer to a model that fills blanks."""

import torch

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.settings import check_tokenizer
from megatron_glm.data.tokenizer import GLMTokenizer
from megatron_glm.inference.blanks import BlankCodec
from megatron_glm.inference.engine import Engine
from megatron_glm.inference.generation import Filler
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.weights import Weights


def default_dtype(source: Source, bits: int | None, device: torch.device) -> torch.dtype:
    """The type of the arithmetic where nobody has asked for one: bf16 with quantised weights, for
    the packed kernels; else fp32 on a CPU and the checkpoint's own on a GPU."""
    if bits or source.bits:
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" else source.dtype


def load_filler(
    source: Source,
    tokenizer: GLMTokenizer,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Filler:
    """Reads this rank's part of a checkpoint.

    dtype: see `default_dtype`. bits: 8 or 4 to quantise the linear weights of the layers.
    CheckpointError where the tokenizer is not the one that the model was trained with, or the
    layout does not fit.
    """
    settings = source.settings
    check_tokenizer(settings, tokenizer, source.directory)
    weights = Weights(source, layout, device, dtype or default_dtype(source, bits, device), bits)
    codec = BlankCodec(tokenizer, settings.unified_multitask_encoding)
    return Filler(Engine(settings, weights, layout), codec)
