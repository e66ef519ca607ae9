"""Which formats there are, and how a checkpoint of each is opened."""

from pathlib import Path

from megatron_glm.checkpoint.convert import Source
from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.hugging_face import HuggingFaceCheckpoint
from megatron_glm.checkpoint.megatron import TRACKER, MegatronCheckpoint
from megatron_glm.checkpoint.sat import SATCheckpoint
from megatron_glm.checkpoint.table import Format

FORMATS = tuple(fmt.value for fmt in Format)
_MARKS = {Format.MEGATRON: TRACKER, Format.SAT: "latest", Format.HUGGING_FACE: "config.json"}


def detect_format(directory: str | Path) -> Format:
    """The format of a checkpoint by its marking file; CheckpointError where there is none."""
    for fmt, mark in _MARKS.items():
        if (Path(directory) / mark).is_file():
            return fmt
    raise CheckpointError(
        f"{directory}: holds none of {', '.join(_MARKS.values())}, so it is no checkpoint of "
        f"{', '.join(FORMATS)}"
    )


def open_checkpoint(
    directory: str | Path,
    fmt: Format | None = None,
    num_attention_heads: int | None = None,
    iteration: int | None = None,
) -> Source:
    """Opens a checkpoint; its format is detected where it is not given.

    num_attention_heads: for SAT files without rotary frequencies. iteration: of a Megatron
    checkpoint, the latest by default.
    """
    fmt = detect_format(directory) if fmt is None else fmt
    if fmt is Format.SAT:
        return SATCheckpoint(directory, num_attention_heads)
    if fmt is Format.HUGGING_FACE:
        return HuggingFaceCheckpoint(directory)
    return MegatronCheckpoint(directory, iteration)
