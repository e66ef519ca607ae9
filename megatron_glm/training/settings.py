"""What a checkpoint was trained with, stored in it and compared before anything is loaded.

Megatron stores its flags with a checkpoint and compares three of them. A GLM that is continued
with other rotary angles, another position scheme or another tokenizer loads without a word and
learns something else, so all of that is compared here, with the cure in the message.
"""

import contextlib
import io
import logging
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

from megatron_glm.data.config import CUTTING_FLAGS
from megatron_glm.errors import GLMError, flag_of
from megatron_glm.training.save_errors import whole_checkpoints

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """A flag that shapes what weights mean."""

    dest: str
    flag: str


SETTINGS = (
    Setting("num_layers", "--num-layers"),  # and with it DeepNorm's alpha
    Setting("hidden_size", "--hidden-size"),
    Setting("ffn_hidden_size", "--ffn-hidden-size"),
    Setting("num_attention_heads", "--num-attention-heads"),
    Setting("kv_channels", "--kv-channels"),
    Setting("padded_vocab_size", "--padded-vocab-size"),
    Setting("layernorm_epsilon", "--norm-epsilon"),
    Setting("rotary_base", "--rotary-base"),
    Setting("rotary_angle_dtype", "--rotary-angle-dtype"),
    Setting("unified_multitask_encoding", "--unified-multitask-encoding"),
    Setting("tokenizer_fingerprint", "--tokenizer-model"),
)
# Where the data of a run stands: the mix of its sources, and the ledger of what it has read.
# Megatron stores its arguments with every checkpoint, and these with them.
DATA_STATES = ("mix_state", "ledger_state")
_SCHEDULE_ASSERTION = re.compile(
    r"OptimizerParamScheduler: class input value (.*) and checkpoint ?value (.*) for (.*) do not"
)
# What Megatron calls the parts of a schedule there, and what a user does. It counts in samples.
_SCHEDULE_FLAGS = {
    "learning rate": "--lr",
    "minimum learning rate": "--min-lr",
    "warmup iterations": "warm-up samples",
    "total number of iterations": "decay samples",
    "learning rate decay style": "--lr-decay-style",
    "start weight decay": "--start-weight-decay",
    "end weight decay": "--end-weight-decay",
}
# Meant to be shown, not to be typed.
_NO_VALUE = "(not stored)"


class CheckpointMismatchError(GLMError):
    """A checkpoint was made with settings that differ from the flags."""


class ScheduleMismatchError(CheckpointMismatchError):
    """It was made with another schedule, as all ranks find that have agreed to load it."""

    is_everywhere = True


def current_settings(args: Namespace) -> dict:
    """The settings of this run, as they go into `args.glm_settings` and so into checkpoints."""
    return {setting.dest: getattr(args, setting.dest) for setting in SETTINGS}


def compare_settings(saved: dict, current: dict, checkpoint: str) -> None:
    """Raises CheckpointMismatchError that lists every setting of the checkpoint that differs.

    A tokenizer that the checkpoint does not know (None), as the released weights do not, is not
    compared but warned of.
    """
    if saved.get("tokenizer_fingerprint", _NO_VALUE) is None:
        logger.warning("%s does not say with which tokenizer it was trained: --tokenizer-model is "
                       "taken on trust", checkpoint)
        saved = saved | {"tokenizer_fingerprint": current["tokenizer_fingerprint"]}
    differences = [
        f"{setting.flag} {saved.get(setting.dest, _NO_VALUE)} there, {current[setting.dest]} here"
        for setting in SETTINGS
        if saved.get(setting.dest, _NO_VALUE) != current[setting.dest]
    ]
    if differences:
        raise CheckpointMismatchError(
            f"{checkpoint} was trained with other settings: {'; '.join(differences)}. Give the "
            "flags of the checkpoint, or another --load; nothing was loaded or overwritten"
        )


def check_checkpoints(args: Namespace) -> None:
    """Compares this run's settings with those of the checkpoints that it would load.

    CheckpointMismatchError where they differ, where the run would read its text cut in another way,
    where --save already holds a run that --load does not continue, which would be overwritten
    checkpoint by checkpoint, where --ckpt-step would go back a second time, and where there is no
    checkpoint, or the file is lost that names the latest: Megatron would start from random weights.
    """
    from megatron.training.checkpointing import checkpoint_exists

    goes_on = args.load is not None and args.save is not None and (
        os.path.realpath(args.load) == os.path.realpath(args.save)
    )
    must_exist = args.exit_on_missing_checkpoint and args.pretrained_checkpoint is None
    for flag, directory, may_be_new in (
        ("--load", args.load, goes_on and not must_exist),
        ("--pretrained-checkpoint", args.pretrained_checkpoint, False),
        ("--save", args.save, True),
    ):
        if directory is not None and not checkpoint_exists(directory):
            _refuse_to_start_anew(flag, directory, may_be_new)
    whole = whole_checkpoints(args.load) if args.load is not None else []
    if args.ckpt_step is not None and whole and args.ckpt_step not in whole:
        raise CheckpointMismatchError(
            f"--ckpt-step {args.ckpt_step}: --load {args.load} holds no whole one; the "
            f"nearest is {min(whole, key=lambda step: abs(step - args.ckpt_step))}"
        )
    for directory in (args.load, args.pretrained_checkpoint):
        if directory is not None and checkpoint_exists(directory):
            _check_checkpoint(args, directory)
    if goes_on and args.ckpt_step and checkpoint_exists(args.load):
        _check_goes_back_once(args)
    if args.save is not None and checkpoint_exists(args.save) and not goes_on:
        raise CheckpointMismatchError(
            f"--save {args.save} holds a run already, which this one would overwrite: give the "
            "same directory to --load to continue it, or another one to --save"
        )


@contextlib.contextmanager
def schedule_mismatch_in_words(directory: str | None) -> Iterator[None]:
    """Turns Megatron's assertion about the learning-rate schedule of a checkpoint in `directory`
    into a ScheduleMismatchError that says how to go on."""
    try:
        yield
    except AssertionError as error:
        match = _SCHEDULE_ASSERTION.search(str(error))
        if match is None:
            raise
        here, there, name = match.groups()
        raise ScheduleMismatchError(
            f"{directory} was saved with another schedule: {_SCHEDULE_FLAGS.get(name, name)} "
            f"{there} there, {here} here; give --override-opt-param-scheduler to go on by the "
            "flags, or --use-checkpoint-opt-param-scheduler by what was stored"
        ) from error


def _refuse_to_start_anew(flag: str, directory: str, may_be_new: bool) -> None:
    if whole := whole_checkpoints(directory):
        raise CheckpointMismatchError(
            f"{flag} {directory} holds checkpoints up to iteration {whole[-1]}, but not the file "
            "that names the latest, so that the run would start anew and overwrite them: go on by "
            f"`echo {whole[-1]} >{directory}/latest_checkpointed_iteration.txt`, or give another "
            "directory"
        )
    if not may_be_new:
        raise CheckpointMismatchError(
            f"{flag} {directory}: holds no checkpoint; give the folder of one, or to --load the "
            "folder of --save, without --exit-on-missing-checkpoint, to begin a run there and go "
            "on with it"
        )


def _check_checkpoint(args: Namespace, directory: str) -> None:
    state, is_release = _saved_state(args, directory)
    saved = state["args"]
    settings = getattr(saved, "glm_settings", None)
    if settings is None:
        raise CheckpointMismatchError(
            f"{directory} holds no GLM settings: it was not written by pretrain_glm.py or "
            "tools/convert_checkpoint.py"
        )
    compare_settings(settings, current_settings(args), directory)
    if directory == args.load and not args.finetune:
        if not (is_release or args.skip_train):
            _check_cut(args, saved, directory)
        for data_state in DATA_STATES:
            setattr(args, data_state, getattr(saved, data_state, None))
    # Of a release, weights as tools/convert_checkpoint.py writes them, Megatron loads no more.
    loads_optimizer = not (is_release or args.finetune or args.no_load_optim)
    if directory == args.load and loads_optimizer:
        _check_optimizer_state(args, saved, directory)


def _check_cut(args: Namespace, saved: Namespace, directory: str) -> None:
    changes = [
        f"{flag_of(name)} {before} there, {getattr(args, name)} here"
        for name in CUTTING_FLAGS
        if (before := getattr(saved, name, getattr(args, name))) != getattr(args, name)
    ]
    # A conversion may know nothing of a run.
    if changes and getattr(saved, "seed", None) == args.seed:
        raise CheckpointMismatchError(
            f"{directory} has read its text cut into other sequences: {'; '.join(changes)}. The "
            "run would read some text again and pass over other. Give the flags of the checkpoint, "
            f"or another --seed than {args.seed} to read all of it anew in another order"
        )


def _check_goes_back_once(args: Namespace) -> None:
    """Of a job that is started again by the same line, each start would go back."""
    latest, _ = _saved_state(Namespace(**vars(args) | {"ckpt_step": None}), args.load)
    went_back_to = getattr(latest["args"], "ckpt_step", None)
    if went_back_to == args.ckpt_step < latest["iteration"]:
        raise CheckpointMismatchError(
            f"--ckpt-step {args.ckpt_step}: a run that went back there has saved iteration "
            f"{latest['iteration']} since, which would be lost. Drop the flag to go on from it; to "
            f"go back once more, drop it and `echo {args.ckpt_step} "
            f">{args.load}/latest_checkpointed_iteration.txt`"
        )


def _check_optimizer_state(args: Namespace, saved: Namespace, directory: str) -> None:
    if saved.no_save_optim:
        raise CheckpointMismatchError(
            f"{directory} holds weights without the state of an optimizer: start from them with "
            "--finetune, or go on with a fresh optimizer by --no-load-optim"
        )
    if saved.use_distributed_optimizer != args.use_distributed_optimizer:
        with_or_without = "with" if saved.use_distributed_optimizer else "without"
        raise CheckpointMismatchError(
            f"{directory} was saved {with_or_without} --use-distributed-optimizer, whose state the "
            f"other cannot read: resume {with_or_without} it, or drop the state with "
            "--no-load-optim"
        )
    is_other_layout = any(
        getattr(saved, size) != getattr(args, size)
        for size in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    )
    if (
        is_other_layout
        and saved.use_distributed_optimizer
        and not saved.dist_ckpt_optim_fully_reshardable
    ):
        raise CheckpointMismatchError(
            f"{directory} was saved by the distributed optimizer at TP "
            f"{saved.tensor_model_parallel_size}, PP {saved.pipeline_model_parallel_size} without "
            "--dist-ckpt-optim-fully-reshardable, so its optimizer state cannot be read at another "
            "layout: resume at that one and save once with the flag, or drop the state with "
            "--no-load-optim"
        )


def _saved_state(args: Namespace, directory: str) -> tuple[dict, bool]:
    """What is stored with a checkpoint beside tensors, and whether it is a release."""
    from megatron.training.checkpointing import _load_base_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        state_dict, _, is_release, _ = _load_base_checkpoint(directory, args, rank0=True)
    if not state_dict or "args" not in state_dict:
        raise CheckpointMismatchError(
            f"{directory} cannot be read as a checkpoint: no arguments are stored in it"
        )
    return state_dict, is_release
