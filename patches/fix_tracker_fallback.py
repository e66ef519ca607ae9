"""Starts and saves trust the file that names the newest checkpoint, even one left empty."""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from patches.patch import Patch, Target

logger = logging.getLogger(__name__)


def newest_whole(read_metadata: Callable) -> Callable:
    """read_metadata that goes back to the newest whole checkpoint where the named one is not."""

    @wraps(read_metadata)
    def read(tracker_filename: str) -> tuple[int, bool]:
        tracker = Path(tracker_filename)
        named = tracker.read_text().strip()
        found = best(tracker, named)
        if found == named:
            return read_metadata(tracker_filename)
        logger.warning(
            "%s names %r, which is not a whole checkpoint: loading %s", tracker, named, found
        )
        # Through the original all the same: it compares the iterations of all ranks.
        with TemporaryDirectory() as directory:
            corrected = Path(directory, tracker.name)
            corrected.write_text(found)
            return read_metadata(str(corrected))

    return read


def mended_first(save_checkpoint: Callable) -> Callable:
    """save_checkpoint that first has the file name a whole checkpoint, where it names none.

    With --save-retain-interval Megatron reads there which checkpoint to delete.
    """

    @wraps(save_checkpoint)
    def save(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import checkpointing

        directory = checkpointing.get_args().save
        if directory is not None and torch.distributed.get_rank() == 0:
            mend(Path(checkpointing.get_checkpoint_tracker_filename(directory)))
        return save_checkpoint(*args, **kwargs)

    return save


def mend(tracker: Path) -> None:
    if tracker.exists() and best(tracker, named := tracker.read_text().strip()) != named:
        mended = tracker.with_suffix(".new")
        mended.write_text(best(tracker, named))
        mended.replace(tracker)


def best(tracker: Path, named: str) -> str:
    """What the file should say: `named` where that may be whole, else the newest whole before it.

    A distributed checkpoint is whole once it has `metadata.json`, which is written last. Folders
    of other formats are left to Megatron's judgement.
    """
    names = [p.parent.name for p in tracker.parent.glob("iter_*/metadata.json")]
    whole = [int(name[5:]) for name in names if name[5:].isdigit()]
    if named == "release":
        return named
    if named.isdigit():
        legacy = any(tracker.parent.glob(f"iter_{int(named):07d}/mp_rank_*"))
        if int(named) in whole or not whole or legacy:
            return named
        whole = [iteration for iteration in whole if iteration < int(named)]
    if not whole:
        raise FileNotFoundError(
            f"{tracker} names {named!r}, and no checkpoint beside it is whole (has a "
            "metadata.json). Point --load elsewhere, or remove the file to start anew."
        )
    return str(max(whole))


def reproduces() -> bool:
    """True where an empty file ends the program."""
    from megatron.training.checkpointing import read_metadata

    with TemporaryDirectory() as directory:
        tracker = Path(directory, "latest_checkpointed_iteration.txt")
        tracker.write_text("")
        try:
            read_metadata(str(tracker))
        except SystemExit:
            return True
        except FileNotFoundError:
            return False
    return False


PATCH = Patch(
    reason="the file is truncated and written in place: after a kill in between, or on a full "
    "disk, the next start ends with exit status 0 and has trained nothing, although older "
    "checkpoints are whole, and a save with --save-retain-interval stops",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target("megatron.training.checkpointing:read_metadata", "4097e86b47f78c9b", newest_whole),
        Target(
            "megatron.training.checkpointing:save_checkpoint",
            "b652984ca8c8309d",
            mended_first,
            also=("megatron.training.training:save_checkpoint",),
        ),
    ),
    reproduces=reproduces,
)
