"""What every rank of a test starts with; see ranks.py."""

import importlib

import torch

import patches

torch.set_num_threads(1)
patches.apply()
# Megatron imports these when they are first used, that is, once in every rank.
for late in (
    "megatron.training.models",
    "torch._dynamo",
    "torch.distributed.checkpoint",
):
    importlib.import_module(late)
