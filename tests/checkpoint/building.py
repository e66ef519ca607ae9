"""Small checkpoints of random weights, in memory and in every format."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import dynamic_module_utils

from megatron_glm.checkpoint.hugging_face_writer import ExportedTokenizer, HuggingFaceWriter
from megatron_glm.checkpoint.megatron_writer import MegatronWriter
from megatron_glm.checkpoint.sat_writer import SATWriter
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Dimensions, Format, Tensor, tensors
from megatron_glm.checkpoint.target import Request, plan_target
from megatron_glm.checkpoint.torch_file import empty

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "glm130b_tiny"
GOLDEN_SAT = {1: GOLDEN / "sat", 2: GOLDEN / "sat_tp2", 4: GOLDEN / "sat_tp4"}
# Splits into 1 to 8 parts, and fills 32-bit words in each of them.
SMALL = Dimensions(
    num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, vocab_size=64
)
SPECIAL_IDS = {
    "[MASK]": 50, "[gMASK]": 51, "[sMASK]": 52, "<eod>": 53, "<sop>": 54, "<eop>": 55, "<pad>": 56,
}  # fmt: skip


class MemorySource:
    """A checkpoint in memory: the weights by Megatron name."""

    def __init__(
        self,
        dimensions: Dimensions = SMALL,
        dtype: torch.dtype = torch.float16,
        seed: int = 0,
        **settings,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.directory, self.iteration = Path("memory"), 7
        self.dtype, self.bits, self.scales = dtype, None, {}
        self.settings = Settings(
            dimensions, **{"rotary_angle_dtype": "fp32", "unified_multitask_encoding": True,
                           "seq_length": 64} | settings
        )  # fmt: skip
        self.weights = {
            tensor.name(Format.MEGATRON): (
                torch.randn(tensor.shape(dimensions), generator=generator) / 4
                + (1 if "layernorm.weight" in tensor.row.megatron else 0)
            ).to(dtype)
            for tensor in tensors(dimensions)
        }

    def read(self, tensor: Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        weight = self.weights[tensor.name(Format.MEGATRON)]
        return empty(weight.shape, weight.dtype, memory).copy_(weight)


def write_sat(folder: Path, source: MemorySource, tp_size: int = 1) -> Path:
    folder.mkdir()
    SATWriter(source.settings, tp_size, source.dtype, None).write(folder, 7, source.read)
    return folder


def write_megatron(folder: Path, source: MemorySource, iteration: int | None = None) -> Path:
    folder.mkdir()
    MegatronWriter(source.settings, source.dtype, iteration).write(folder, source.read)
    return folder


def write_hugging_face(
    folder: Path, source: MemorySource, tokenizer: ExportedTokenizer | None = None, **options
) -> Path:
    folder.mkdir()
    writer = HuggingFaceWriter(source.settings, source.dtype, tokenizer=tokenizer, **options)
    writer.write(folder, source.read)
    return folder


def plan(source, fmt: Format, **options):
    """The target of a conversion of `source`, without a tokenizer."""
    return plan_target(Request(fmt, **options), source, source.settings, None)


@contextlib.contextmanager
def remote_code_in(folder: Path) -> Iterator[None]:
    """transformers copies the code of exports to `folder`, not to the home of who runs the tests,
    and forgets it afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            patch.delitem(sys.modules, name)
        patch.syspath_prepend(str(folder))
        yield
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


def read_all(source) -> dict[str, torch.Tensor]:
    """Every tensor of a source by Megatron name."""
    return {
        tensor.name(Format.MEGATRON): source.read(tensor)
        for tensor in tensors(source.settings.dimensions)
    }


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Names, types, shapes and bits of two sets of tensors are the same."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(
            tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        ), name
