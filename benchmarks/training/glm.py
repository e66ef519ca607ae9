"""This project's training program: `pretrain_glm.py` with its data loader, on random tokens.

Variant "causal" gives the same model and loop one sample a sequence without a context, which is
the causal language model of the same dimensions on this engine.
"""

from benchmarks.training.megatron_loop import LOOP, size_flags, take_turns  # isort: skip

import sys
from dataclasses import replace
from pathlib import Path

import torch

import pretrain_glm
from benchmarks.training.corpus import corpus_flags
from benchmarks.training.turns import Task, Turns
from megatron_glm.training.batch import Batch

CAUSAL = "causal"
# Enough that no step repeats what a cache would hold.
STEPS_OF_TEXT = 40


def run(task: Task, turns: Turns) -> None:
    """Trains until the driver stops it."""
    take_turns(turns)
    next_batch = pretrain_glm.next_batch

    def next_noted_batch(*args, **kwargs) -> Batch:
        batch = next_batch(*args, **kwargs)
        if turns.variant == CAUSAL:
            batch = without_context(batch)
        turns.saw(batch.samples, batch.num_targets)
        return batch

    pretrain_glm.next_batch = next_noted_batch
    sys.argv = ["pretrain_glm.py", *flags(task)]
    pretrain_glm.main()


def flags(task: Task) -> list[str]:
    """Flags of the training program; makes the corpus where it runs."""
    num_tokens = STEPS_OF_TEXT * task.size.num_tokens
    corpus = corpus_flags(Path.cwd(), task.size.vocab_size, num_tokens)
    return [*size_flags(task), *LOOP, *corpus, "--num-workers", "2", *task.flags]


def without_context(batch: Batch) -> Batch:
    """The same tokens as one sample a sequence, each token seeing what precedes it and a target."""
    return replace(
        batch,
        context_lengths=torch.zeros_like(batch.context_lengths),
        sample_ends=torch.full_like(batch.sample_ends, batch.tokens.shape[1]),
        loss_mask=torch.ones_like(batch.loss_mask),
        num_targets=batch.tokens.numel(),
    )
