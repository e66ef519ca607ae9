"""GLM's flags beside Megatron's: registration and defaults.

A flag is a field of a dataclass; its docstring is the help text. Megatron's own flags keep their
meaning and get GLM-130B's values as defaults (paper, table 11); rules.py refuses those that would
train something else.
"""

import argparse
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

import torch
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_glm.data.config import GLMDataArguments, default_max_samples
from megatron_glm.data.tokenizer import TEXT_SCHEMES, TOKENIZER_TYPES
from megatron_glm.device import has_gpu
from megatron_glm.errors import FlagError, exit_with_one_line
from megatron_glm.flags.batch_ramp import ramp_batch_size
from megatron_glm.flags.presets import PRESETS
from megatron_glm.flags.rules import check_flags, check_start
from megatron_glm.model.config import GLMArchitecture
from megatron_glm.model.linears import select_linears


@dataclass
class GLMRunArguments:
    """How a GLM run is set up."""

    glm_preset: str | None = field(
        default=None, metadata={"argparse_meta": {"choices": sorted(PRESETS)}}
    )
    """A published size: number of layers, hidden, FFN and head sizes, sequence length. Every field
    of it is overridden by its own flag."""

    text_scheme: str | None = field(
        default=None, metadata={"argparse_meta": {"choices": TEXT_SCHEMES}}
    )
    """How an IceTokenizer treats white space; must be the scheme that the data was made with."""

    mask_conformance_check: bool = field(
        default=True,
        metadata={"argparse_meta": {"arg_names": ["--mask-conformance-check"],
                                    "action": argparse.BooleanOptionalAction}},
    )
    """Perturb tokens on the real attention backend at start, and refuse to train where one that
    must be visible is not, or one that must be hidden is seen."""

    kernel_conformance_check: bool = field(
        default=True,
        metadata={"argparse_meta": {"arg_names": ["--kernel-conformance-check"],
                                    "action": argparse.BooleanOptionalAction}},
    )
    """On a GPU, compare results and gradients of every kernel with torch's operations at start, and
    refuse to train where they differ by more than rounding."""


DEFAULTS: dict[str, Any] = {
    # The architecture, as Megatron names it.
    "position_embedding_type": "none",
    "transformer_impl": "local",
    "init_method_std": 0.0052,
    "attention_softmax_in_fp32": True,
    "max_position_embeddings": 2048,
    # What needs Apex or Transformer Engine, or computes another function.
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "no_persist_layer_norm": True,
    # Without it the micro-batch size would weigh the tokens.
    "calculate_per_token_loss": True,
    # Nothing of size s x s is ever made.
    "create_attention_mask_in_dataloader": False,
    # Training as in table 11.
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
    # Table 11 has 65536, for the mean over a micro-batch. Here the loss is summed over the targets
    # until the end of the step, so the scale is that of a single one: 65536 over the some 1200
    # targets of a sequence, and over 1 to 176 micro-batches, corresponds to 55 down to 0.3.
    "initial_loss_scale": 64,
    "min_loss_scale": 2.0**-16,
    "loss_scale_window": 2000,
    "short_seq_prob": 0.02,
    "split": "949,50,1",
    "eval_interval": 1000,
    # Every 500 steps was found too sparse when a loss explosion had to be gone back behind.
    "save_interval": 250,
    # To run a suspect step again, Megatron waits for all ranks at the end of every backward pass.
    "rerun_mode": "disabled",
    "dataloader_type": "single",
}


def add_glm_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds GLM's flags and defaults to Megatron's parser, after Megatron's own."""
    megatrons = {action.dest: action for action in parser._actions}
    own = []
    for group, title in (
        (GLMRunArguments, "GLM run"),
        (GLMArchitecture, "GLM architecture"),
        (GLMDataArguments, "GLM data and objective"),
    ):
        # Megatron has some of GLM's names already (--mask-prob, --short-seq-prob).
        factory = ArgumentGroupFactory(group, exclude=sorted(megatrons))
        own += factory.build_group(parser, title)._group_actions
        for name in megatrons.keys() & factory.field_docstrings.keys():
            megatrons[name].help = factory.field_docstrings[name]
            own.append(megatrons[name])
    for action in own:
        if "default" not in action.help.lower():
            action.help += " Default: %(default)s."
    _say_what_is_different(parser)
    parser.usage = "%(prog)s FLAGS"
    parser.error = partial(_refuse, parser)
    defaults = dict(DEFAULTS)
    if not torch.cuda.is_available():
        defaults["distributed_backend"] = "gloo"
    defaults |= PRESETS.get(_preset_name(parser), {})
    parser.set_defaults(**defaults)
    return parser


def fill_derived(args: Namespace) -> None:
    """Sets what follows from other flags and was not given, in `args` and in the environment."""
    # Megatron refuses tensor parallelism without it, of programs too that train nothing. For one
    # that trains it comes too late (pretrain_glm.py).
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if args.seq_length and args.seq_length > args.max_position_embeddings:
        args.max_position_embeddings = args.seq_length
    if args.seq_length and args.max_samples_per_sequence is None:
        args.max_samples_per_sequence = default_max_samples(args.seq_length)


def pin_padded_vocab_size(args: Namespace, vocab_size: int) -> None:
    """Sets `args.padded_vocab_size`, independent of the tensor parallel size.

    Megatron multiplies --make-vocab-size-divisible-by by the tensor parallel size, so the shape of
    a checkpoint would change with it. FlagError where a given size cannot hold the tokenizer.
    """
    divisor, tp = args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    if args.padded_vocab_size is None:
        args.padded_vocab_size = -(-vocab_size // divisor) * divisor
    if args.padded_vocab_size < vocab_size:
        raise FlagError(
            f"--padded-vocab-size {args.padded_vocab_size}: smaller than the {vocab_size} tokens "
            f"of {args.tokenizer_model}; give another tokenizer or a larger size"
        )
    if args.padded_vocab_size % tp:
        raise FlagError(
            f"--padded-vocab-size {args.padded_vocab_size}: not divisible by --tensor-model-"
            f"parallel-size {tp}; set --make-vocab-size-divisible-by to a multiple of {tp}"
        )


def parse_glm_args(build_tokenizer: Callable[[Namespace], Any]) -> Namespace:
    """Parses, checks and publishes Megatron's and GLM's flags.

    build_tokenizer: called with the validated flags where Megatron would build its tokenizer;
    must set `args.padded_vocab_size` (see pin_padded_vocab_size).

    Exits with status 2 and one line on a flag that GLM refuses.
    """
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args(add_glm_arguments)
    # Megatron says by assertions what is wrong with a flag.
    with exit_with_one_line(AssertionError, rank=args.rank, local_rank=args.local_rank):
        check_flags(args)
        check_start(args)
        has_gpu()
        # Before anything is built, see whether it can be had here.
        select_linears(args.transformer_impl)
        fill_derived(args)
        ramp_batch_size(args)
        validate_args(args)
        global_vars.build_tokenizer = build_tokenizer
        if args.rank:
            # The schedule of a ramp, which Megatron prints on every rank.
            global_vars.print = lambda *_: None
        global_vars.set_global_variables(args)
    return args


def _say_what_is_different(parser: ArgumentParser) -> None:
    actions = {action.dest: action for action in parser._actions}
    actions["tokenizer_type"].choices = list(TOKENIZER_TYPES)
    actions["tokenizer_type"].help = (
        "Kind of tokenizer; must be the one that the data was made with."
    )
    actions["init_method_std"].help = (
        "Standard deviation of the initial word embeddings. That of every other matrix is "
        "DeepNorm's, which follows from its sizes. Default: %(default)s."
    )
    # Megatron shows numbers, and ends in a KeyError where one is given.
    actions["exit_signal"].metavar = "NAME"
    actions["exit_signal"].type = _signal
    actions["exit_signal"].help = "Signal that --exit-signal-handler waits for. Default: SIGTERM."


def _signal(name: str) -> signal.Signals:
    try:
        return signal.Signals[name]
    except KeyError as error:
        raise argparse.ArgumentTypeError(f"{name}: must be a name like SIGUSR1") from error


def _refuse(parser: ArgumentParser, message: str) -> NoReturn:
    """Ends the program by one line, as other refusals do; argparse would show 700 of usage."""
    if "unrecognized" in message:
        known = [flag for action in parser._actions for flag in action.option_strings]
        for word in message.split():
            if meant := get_close_matches(word.partition("=")[0], known, n=1):
                message += f"; {word}: did you mean {meant[0]}?"
    with exit_with_one_line(rank=int(os.getenv("RANK", "0"))):
        raise FlagError(f"{message}; --help lists all flags")


def _preset_name(parser: ArgumentParser) -> str | None:
    """The preset has to be known before parsing: its values are defaults, which flags override."""
    action = next(a for a in parser._actions if a.dest == "glm_preset")
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--glm-preset", choices=action.choices)
    return early.parse_known_args()[0].glm_preset
