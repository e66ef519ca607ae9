"""Inputs on which two checkpoints, or a checkpoint and stored logits, are compared."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.quantization import QuantizedWeight
from megatron_glm.checkpoint.reference import forward
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Format, find


@dataclass(frozen=True)
class Cases:
    """Packed sequences, one a case: tokens, position_ids int64 [case, s]; samples int64
    [case, k, 3], rows of (start, context length, length), unused ones 0; logits fp32
    [case, s, v] by rotary angle type, where they are stored."""

    tokens: torch.Tensor
    position_ids: torch.Tensor
    samples: torch.Tensor
    logits: dict[str, torch.Tensor]

    def inside(self) -> torch.Tensor:
        """bool [case, s]: tokens that belong to a sample."""
        positions = torch.arange(self.tokens.shape[1])
        start, length = self.samples[..., 0, None], self.samples[..., 2, None]
        return ((start <= positions) & (positions < start + length)).any(dim=1)


class Comparison(NamedTuple):
    """One case of two: largest difference of a logit, share of tokens with the same next one."""

    largest_difference: float
    agreement: float


def load_cases(path: Path) -> Cases:
    """Reads a .npz with the fields of `Cases`, logits under `logits` (fp32 angles) and
    `logits_fp16_rope`. CheckpointError says what is missing or does not fit."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        tokens, samples = arrays["tokens"], arrays["samples"]
        logits = {
            angles: arrays[name].float()
            for angles, name in (("fp32", "logits"), ("fp16", "logits_fp16_rope"))
            if name in arrays
        }
        if tokens.dim() != 2 or arrays["position_ids"].shape != tokens.shape:
            raise ValueError("tokens and position_ids must be [case, s]")
        if samples.dim() != 3 or samples.shape[0] != len(tokens) or samples.shape[2] != 3:
            raise ValueError("samples must be [case, k, 3]")
        if any(value.shape[:2] != tokens.shape for value in logits.values()):
            raise ValueError("logits must be [case, s, v]")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"--cases {path}: cannot be used ({error})") from None
    return Cases(tokens.long(), arrays["position_ids"].long(), samples.long(), logits)


def random_cases(settings: Settings, seed: int = 0, num_cases: int = 6) -> Cases:
    """Packs of [gMASK]-like samples (positions run on) and [MASK]-like ones (positions of what
    fills the blank repeat one of the context), of random tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    length = min(settings.seq_length, 96)
    vocab_size = settings.dimensions.vocab_size
    tokens = torch.randint(0, vocab_size, (num_cases, length), generator=generator)
    position_ids = torch.zeros(num_cases, length, dtype=torch.int64)
    samples = torch.zeros(num_cases, 4, 3, dtype=torch.int64)
    for case in range(num_cases):
        start = 0
        for number in range(1 + case % 4):
            size = length - start if number == case % 4 else draw(2, (length - start) // 2)
            context = draw(1, size)
            samples[case, number] = torch.tensor([start, context, size])
            positions = torch.arange(size)
            if number % 2:
                positions[context:] = draw(0, context)
            position_ids[case, start : start + size] = positions
            start += size
    return Cases(tokens, position_ids, samples, {})


def run_reference(source: Source, cases: Cases) -> torch.Tensor:
    """Logits fp32 [case, s, v] by the plain forward, which reads one weight at a time."""

    def read(name: str) -> torch.Tensor:
        value = source.read(find(Format.MEGATRON, name))
        return value.dequantize() if isinstance(value, QuantizedWeight) else value

    return forward(
        read, source.settings.dimensions, cases.tokens, cases.position_ids, cases.samples,
        source.settings.rotary_angle_dtype,
    )  # fmt: skip


def compare(cases: Cases, ours: torch.Tensor, theirs: torch.Tensor) -> Iterator[Comparison]:
    """One comparison a case, over the tokens that belong to samples. NaN counts as infinity."""
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"logits {list(ours.shape)} cannot be compared with {list(theirs.shape)}"
        )
    for case, inside in enumerate(cases.inside()):
        a, b = ours[case, inside], theirs[case, inside]
        difference = (a - b).abs().nan_to_num(nan=torch.inf).max().item()
        agreement = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
        yield Comparison(difference, agreement)
