"""Megatron's own trainer with its own GPT, a few steps of it, for the tests of the patches."""

import contextlib
import os
import sys
from functools import partial

import numpy as np
import torch

SEQUENCE = 16
# A multiple of the padding at TP 2, which is twice that of TP 1.
VOCABULARY = 128
STEPS = 6

FLAGS = [
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2"),
    *("--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE)),
    *("--position-embedding-type", "rope", "--no-rope-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
    *("--no-persist-layer-norm", "--ckpt-format", "torch_dist"),
    *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", str(STEPS)),
    *("--lr", "1e-2", "--eval-iters", "0", "--eval-interval", "100", "--num-workers", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY - 1)),
    *("--make-vocab-size-divisible-by", str(VOCABULARY // 2)),
    *("--dataloader-type", "single", "--logging-level", "40"),
]


class Ramps(torch.utils.data.Dataset):
    """Sequences that count up from a random start."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = np.random.default_rng(index).integers(VOCABULARY)
        ramp = np.arange(start, start + SEQUENCE + 1, dtype=np.int64) % VOCABULARY
        return {"tokens": ramp[:-1], "labels": ramp[1:]}


def datasets(lengths, vp_stage=None):
    """Datasets of the three splits, of the wanted lengths."""
    return tuple(Ramps(max(length or 0, 1)) for length in lengths)


datasets.is_distributed = True


def train(*flags: str, dropout: float = 0.0, die_at_save: str = "") -> dict[int, list[float]]:
    """Train for STEPS steps in all; the loss of each micro-batch that this rank saw, by step.

    Empty on ranks that compute no loss. `die_at_save` is passed to `kill_in_save`.
    """
    from megatron.core.enums import ModelType
    from megatron.training import get_args, pretrain
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    losses: dict[int, list[float]] = {}

    def loss_of(output):
        loss = output.float().mean()
        losses.setdefault(get_args().curr_iteration, []).append(loss.item())
        return loss, {"lm loss": torch.stack([loss.detach(), torch.ones_like(loss)])}

    def forward_step(iterator, model):
        batch = next(iterator)
        positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
        output = model(batch["tokens"], positions, None, labels=batch["labels"])
        return output, partial(loss_of)

    rates = ("--hidden-dropout", str(dropout), "--attention-dropout", str(dropout))
    sys.argv = ["stock_gpt", *FLAGS, *rates, *flags]
    if die_at_save:
        kill_in_save(die_at_save)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        args = parse_and_validate_args()
        model_config = gpt_config_from_args(args)
        container = pretrain_cfg_container_from_args(args, model_config)
        try:
            pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
        except SystemExit as end:
            # --exit-interval ends the program, with status 0.
            if end.code:
                raise
    return losses


def kill_in_save(iteration: str) -> None:
    """End every rank, as kill -9 would, once the shards of that iteration are on disk.

    The moment before `metadata.json`: all the data is there and nothing says that it is whole.
    """
    import signal

    from megatron.core.dist_checkpointing import serialization

    save_config = serialization.save_config

    def killed(config, folder):
        if str(folder).endswith(iteration):
            os.kill(os.getpid(), signal.SIGKILL)
        save_config(config, folder)

    serialization.save_config = killed
