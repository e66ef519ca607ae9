"""What can be wrong with a checkpoint."""

from megatron_glm.errors import GLMError


class CheckpointError(GLMError):
    """A checkpoint that cannot be read or written; the message names the file and the cure."""


class UnknownTensorError(CheckpointError):
    """A tensor that GLM does not have."""


class MissingTensorError(CheckpointError):
    """A tensor of GLM that a checkpoint lacks."""


class ShapeError(CheckpointError):
    """A tensor whose shape, or the split of it, does not fit the model."""


class CorruptFileError(CheckpointError):
    """A file that is truncated, altered, of another format or that asks to run code."""
