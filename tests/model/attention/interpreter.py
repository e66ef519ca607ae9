"""Triton's interpreter, which runs kernels on a CPU, on versions of numpy that it predates, and
with products and differences in bf16, of which it would take the bits for numbers.

Import before anything that imports Triton.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_scalar_index(tensor, scope):
    """Triton 3.6 calls int() on an array of one element, an error since numpy 2.5."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_scalar_index


def _computed_in_fp32(name):
    """`InterpreterBuilder`'s operation, through fp32 where its first two operands are bf16."""
    operation = getattr(interpreter.InterpreterBuilder, name)

    def compute(self, lhs, rhs, *more):
        if lhs.dtype.scalar != tl.bfloat16:
            return operation(self, lhs, rhs, *more)
        lhs, rhs = (self.cast_impl(operand, tl.float32) for operand in (lhs, rhs))
        result = operation(self, lhs, rhs, *more)
        # What a product is added to is fp32.
        return result if name == "create_dot" else self.cast_impl(result, tl.bfloat16)

    setattr(interpreter.InterpreterBuilder, name, compute)


for _name in ("create_dot", "create_fsub"):
    _computed_in_fp32(_name)


def _bf16_constant(self, value):
    return self.cast_impl(self.get_fp32(value), tl.bfloat16)


interpreter.InterpreterBuilder.get_bf16 = _bf16_constant
