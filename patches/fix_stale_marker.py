"""A save over an older checkpoint leaves the old mark of a whole one while it writes."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from patches.patch import Patch, Target

# Written last; Megatron takes a folder that has it for a whole checkpoint.
MARKER = "metadata.json"


def unmark_first(save: Callable) -> Callable:
    """dist_checkpointing.save that takes the mark away before it writes.

    Rank 0 plans what the others write, so none writes before the mark is gone.
    """

    @wraps(save)
    def save_unmarked(sharded_state_dict: Any, checkpoint_dir: str, *args: Any, **kwargs: Any):
        if torch.distributed.get_rank() == 0:
            Path(checkpoint_dir, MARKER).unlink(missing_ok=True)
        return save(sharded_state_dict, checkpoint_dir, *args, **kwargs)

    return save_unmarked


class Interrupted(Exception):
    """Stands for the end of the process in the middle of a save."""


def reproduces() -> bool:
    """True where a folder still counts as whole after a save into it was interrupted."""
    from tempfile import TemporaryDirectory
    from unittest import mock

    from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, serialization

    with TemporaryDirectory() as directory:
        Path(directory, MARKER).write_text(
            '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'
        )
        with (
            mock.patch.object(torch.distributed, "get_rank", lambda *_: 0),
            mock.patch.object(serialization, "save_preprocess", side_effect=Interrupted),
        ):
            try:
                serialization.save({}, directory)
            except Interrupted:
                return check_is_distributed_checkpoint(directory)
    return False


PATCH = Patch(
    reason="a run that went back and reaches an iteration again overwrites its folder in place: "
    "killed meanwhile, it leaves a mixture of two checkpoints that loads in silence",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.dist_checkpointing.serialization:save",
            "e9626ecdf679a001",
            unmark_first,
            also=("megatron.core.dist_checkpointing:save",),
        ),
    ),
    reproduces=reproduces,
)
