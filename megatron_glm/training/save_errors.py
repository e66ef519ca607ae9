"""What a run says when a checkpoint cannot be written."""

import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_glm.errors import GLMError

# Of megatron.training.training; the second ends what --async-save began.
SAVES = ("save_checkpoint_and_time", "maybe_finalize_async_save")


class SaveError(GLMError):
    """A checkpoint could not be written."""

    def __init__(self, message: str, is_everywhere: bool):
        super().__init__(message)
        self.is_everywhere = is_everywhere


def put_save_errors_in_words(directory: str | None) -> None:
    """Has every failed save end in a SaveError, with what is free in `directory` and what is left.

    torch tells of a full disk by the position in a file that it did not reach.
    """
    from megatron.training import training

    for name in SAVES:
        setattr(training, name, _in_words(getattr(training, name), directory))


def whole_checkpoints(directory: str | Path) -> list[int]:
    """Iterations of the whole checkpoints in a folder, in order: those with the file that is
    written last."""
    folders = (path.parent.name for path in Path(directory).glob("iter_*/metadata.json"))
    return sorted(int(name[5:]) for name in folders if name[5:].isdigit())


def _in_words(save: Callable, directory: str | None) -> Callable:
    @wraps(save)
    def saving(*args, **kwargs):
        try:
            return save(*args, **kwargs)
        except (CheckpointException, OSError) as error:
            # torch raises the first on all ranks where one has failed.
            raise SaveError(
                f"--save {directory}: a checkpoint cannot be written ({_reason(error)}), and "
                f"{shutil.disk_usage(directory).free / 1e9:.2f} GB are free there; "
                f"{_what_is_left(directory)}. Make room (a folder there without metadata.json is "
                "no checkpoint), see that every rank may write and no quota is used up, and start "
                "the same command again",
                is_everywhere=isinstance(error, CheckpointException),
            ) from error

    return saving


def _reason(error: CheckpointException | OSError) -> str:
    if isinstance(error, OSError):
        return str(error)
    return f"rank {', '.join(map(str, error.failures))} failed; its log has the cause"


def _what_is_left(directory: str) -> str:
    whole = whole_checkpoints(directory)
    return f"that of iteration {whole[-1]} is whole" if whole else "none is whole yet"
