"""Triton's interpreter, which runs kernels on a CPU, on versions of numpy that it predates.

Import before anything that imports Triton.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_scalar_index(tensor, scope):
    """Triton 3.6 calls int() on an array of one element, an error since numpy 2.5."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_scalar_index
