"""The compiled code of Triton kernels, PTX, executed on a CPU.

All threads of all programs of a launch go in lock step, an instruction at a time as numpy does it,
on copies of the tensors that lie far apart. Errors: an instruction that is not in the tables here;
an address outside of the tensors, or not aligned as its instruction asks; shared memory read before
it is written, or before an asynchronous copy to it is waited for; threads that wait for others of a
warp or a program which do not come.

What it cannot show: races, since threads never overtake each other and what one writes is there for
all; tensor cores of Hopper (wgmma) and its bulk copies, which it does not know; the last bits of a
GPU's approximations (ex2, rsqrt, division), which are rounded to the nearest here, as are subnormal
numbers where a GPU makes zeros of them; that the assembler translates PTX rightly.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
import triton

from tests.compiling import compile_kernel
from tests.ptx.machine import Machine
from tests.ptx.memory import Memory

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
            torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32",
            torch.int64: "*i64"}  # fmt: skip


def execute_kernels(monkeypatch: pytest.MonkeyPatch, module: ModuleType, gpu: str) -> None:
    """Has launches of the kernels of a module execute what is compiled for a GPU, on the CPU."""
    for name, kernel in vars(module).copy().items():
        # Those that only others call begin with an underscore.
        own = isinstance(kernel, triton.JITFunction) and kernel.__module__ == module.__name__
        if own and not name.startswith("_"):
            monkeypatch.setattr(module, name, Kernel(kernel, gpu))


class Kernel:
    """Stands in for a kernel under `triton.jit` where launchers find it, for tensors on the CPU."""

    def __init__(self, kernel: triton.JITFunction, gpu: str):
        self._kernel, self._gpu = kernel, gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return partial(self._launch, grid)

    def _launch(self, grid, *values, num_warps=4, **more) -> "Kernel":
        options = dict(zip(self._kernel.arg_names, values, strict=False)) | more
        arguments = {name: options.pop(name) for name in self._kernel.arg_names}
        types = {p.name: _type_of(arguments[p.name], p) for p in self._kernel.params}
        program = compile_kernel(self._kernel, types, num_warps, self._gpu, **options)
        given = [arguments[name] for name, type in types.items() if isinstance(type, str)]
        execute(program.asm["ptx"], grid, given, program.metadata.shared)
        # Launchers keep what a launch returns, to launch it themselves.
        return self


def _type_of(value, parameter) -> str | int | None:
    """As Triton tells kernels apart: by types, multiples of 16, and 1 for a constant."""
    if parameter.is_constexpr or value is None:
        # A string by itself would be a type.
        return triton.language.constexpr(value) if isinstance(value, str) else value
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype] + ("!" if value.data_ptr() % 16 else "")
    if isinstance(value, float):
        return "fp32"
    if parameter.do_not_specialize:
        return "i32!"
    return 1 if value == 1 else "i32!" if value % 16 else "i32"


def execute(ptx: str, grid: Sequence[int], arguments: Sequence, shared_bytes: int) -> None:
    """Run a kernel. arguments: tensors on the CPU, which it may write to, int32 and fp32."""
    memory = Memory([x for x in arguments if isinstance(x, torch.Tensor)])
    parameters = [
        memory.address_of(x) if isinstance(x, torch.Tensor)
        else np.float32(x).view(np.uint32).item() if isinstance(x, float) else x
        for x in arguments
    ]  # fmt: skip
    # Triton adds two pointers to scratch memory, which no kernel here has.
    with np.errstate(all="ignore"):
        Machine(ptx, grid, [*parameters, 0, 0], memory, shared_bytes).run()
    memory.write_back()
