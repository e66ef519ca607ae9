"""Megatron-Core's own causal model as `pretrain_gpt.py` builds it for a user without extensions.

Rotary positions, gated FFN, tied embedding, Megatron's local implementation; no Apex, no
Transformer Engine. Its loop, optimizer and DDP are those of the GLM beside it.
"""

from benchmarks.training.megatron_loop import LOOP, size_flags, take_turns  # isort: skip

import sys
from collections.abc import Iterator
from itertools import cycle

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import (
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from torch import Tensor

from benchmarks.training.turns import Task, Turns

WITHOUT_EXTENSIONS = (
    "--transformer-impl", "local", "--position-embedding-type", "rope", "--no-rope-fusion",
    "--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion", "--no-persist-layer-norm",
    "--swiglu",
)  # fmt: skip
NUM_BATCHES = 16


def run(task: Task, turns: Turns) -> None:
    """Trains until the driver stops it."""
    take_turns(turns)
    size = task.size
    backend = "nccl" if turns.device.type == "cuda" else "gloo"
    sys.argv = [
        "pretrain_gpt.py", *size_flags(task), *LOOP, *WITHOUT_EXTENSIONS,
        "--distributed-backend", backend, "--dataloader-type", "external",
        "--tokenizer-type", "NullTokenizer", "--vocab-size", str(size.vocab_size),
        "--make-vocab-size-divisible-by", "1", *task.flags,
    ]  # fmt: skip
    args = parse_and_validate_args()
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))

    def iterators(num_samples, vp_stage=None) -> tuple:
        shape = (NUM_BATCHES, size.micro_batch_size, size.seq_length + 1)
        return cycle(torch.randint(size.vocab_size, shape, device=turns.device)), None, None

    iterators.is_distributed = True
    positions = torch.arange(size.seq_length, device=turns.device).expand(size.micro_batch_size, -1)

    def forward_step(iterator: Iterator[Tensor], model) -> tuple:
        tokens = next(iterator)
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), mean_loss

    pretrain(container, iterators, ModelType.encoder_or_decoder, forward_step)


def mean_loss(losses: Tensor) -> tuple:
    """Loss, number of tokens and report of a micro-batch, as Megatron's schedules take them."""
    loss = losses.float().sum()
    num_tokens = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
    return loss, num_tokens, {"lm loss": torch.stack((loss.detach(), num_tokens.float()))}
