"""Engines over small checkpoints, and the golden cases."""

import numpy as np
import torch

from megatron_glm.checkpoint.sat import SATCheckpoint
from megatron_glm.checkpoint.table import Dimensions
from megatron_glm.inference.blanks import BlankCodec
from megatron_glm.inference.engine import Engine
from megatron_glm.inference.generation import Filler
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.weights import Weights
from tests.checkpoint.building import GOLDEN, GOLDEN_SAT, MemorySource

CPU = torch.device("cpu")
VOCAB_SIZE = 384
LOGITS = {"fp32": "logits", "fp16": "logits_fp16_rope"}


def lively_source(specials: dict[str, int], end_bias: float = 0.0, **settings) -> MemorySource:
    """Random weights that are large enough for varied answers; `end_bias` makes `eop` likelier."""
    source = MemorySource(
        Dimensions(3, 64, 96, 4, VOCAB_SIZE), dtype=torch.float32, seed=3, **settings
    )
    eop = source.weights["embedding.word_embeddings.weight"][specials["<eop>"]]
    source.weights["decoder.final_layernorm.bias"] += end_bias * eop
    return source


def make_engine(source, layout=None, dtype=torch.float32, bits=None, device=CPU) -> Engine:
    layout = layout or Layout()
    return Engine(source.settings, Weights(source, layout, device, dtype, bits), layout)


def make_filler(source, tokenizer) -> Filler:
    return Filler(make_engine(source), BlankCodec(tokenizer))


def golden_samples() -> list[tuple[list[int], list[int], int, dict[str, np.ndarray]]]:
    """Tokens, position ids, context length and logits by rotary mode of every golden sample that
    is more than a context."""
    cases = np.load(GOLDEN / "cases.npz")
    samples = []
    for case, rows in enumerate(cases["samples"].tolist()):
        for start, context, length in rows:
            if length > context:
                part = slice(start, start + length)
                samples.append((
                    cases["tokens"][case, part].tolist(),
                    cases["position_ids"][case, part].tolist(),
                    context,
                    {mode: cases[name][case, part] for mode, name in LOGITS.items()},
                ))
    return samples


def golden_difference(angles: str, layout=None, device=CPU, dtype=torch.float32) -> float:
    """The largest difference from a golden logit behind the contexts: all samples in one batch of
    mixed lengths, each of which leaves it when its tokens are used up."""
    source = SATCheckpoint(GOLDEN_SAT[1])
    source.settings = source.settings.with_overrides(rotary_angle_dtype=angles)
    engine = make_engine(source, layout, dtype, device=device)
    samples = golden_samples()
    engine.prefill([tokens[:context] for tokens, _, context, _ in samples])
    places = [context for _, _, context, _ in samples]
    worst = 0.0
    while samples:
        logits = engine.decode(
            [tokens[at] for (tokens, *_), at in zip(samples, places, strict=True)],
            [positions[at] for (_, positions, *_), at in zip(samples, places, strict=True)],
        ).cpu()
        for row, (*_, golden), at in zip(logits, samples, places, strict=True):
            worst = max(worst, (row - torch.from_numpy(golden[angles][at])).abs().max().item())
        going_on = [i for i, sample in enumerate(samples) if places[i] + 1 < len(sample[0])]
        samples = [samples[i] for i in going_on]
        places = [places[i] + 1 for i in going_on]
        engine.cache.select(going_on)
    return worst
