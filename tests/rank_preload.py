"""What every rank of a test starts with; see ranks.py."""

import importlib
import warnings

import torch

import patches

torch.set_num_threads(1)
with warnings.catch_warnings():
    # Said once already, by the process that runs the tests.
    warnings.simplefilter("ignore")
    patches.apply()
    # Megatron imports these when they are first used, that is, once in every rank.
    for late in (
        "megatron.core.tokenizers.text",
        "megatron.training.models",
        "torch._dynamo",
        "torch.distributed.checkpoint",
    ):
        importlib.import_module(late)
