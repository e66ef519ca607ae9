"""Which files can be drawn into."""

from pathlib import Path

from megatron_glm.errors import GLMError


def check_picture(flag: str, path: Path | None) -> None:
    """GLMError unless the suffix of a picture's path is a format that can be drawn; None is fine.

    flag: that the path was given by. For the start of a program: matplotlib says it at the end.
    """
    if path is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise GLMError(f"{flag} {path}: must end in .{', .'.join(sorted(formats))}")
