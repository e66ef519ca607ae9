"""A picture that cannot be drawn is refused by its name."""

from pathlib import Path

import pytest

from megatron_glm.errors import GLMError
from megatron_glm.pictures import check_picture


def test_pictures_are_known_by_their_suffix():
    for path in (None, Path("a.png"), Path("b/c.SVG"), Path("a.b.pdf")):
        check_picture("--plot", path)
    for path in (Path("a.xyz"), Path("png"), Path("a.png/b")):
        with pytest.raises(GLMError, match=rf"^--plot {path}: must end in .*\.pdf, .*\.png, "):
            check_picture("--plot", path)
