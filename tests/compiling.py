"""Kernels compiled for a GPU that need not be there."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

GPUS = {"H100": 90, "A100": 80}
"""Compute capabilities, times ten."""
NO_SPILLS = "0 bytes spill stores, 0 bytes spill loads"
"""What the assembler says of a program whose registers suffice."""


def compile_kernel(
    kernel: triton.JITFunction, arguments: dict[str, str | int], num_warps: int, gpu: str = "H100",
    **options: int,
) -> CompiledKernel:
    """A kernel for aligned pointers and sizes.

    Args:
        kernel: the function under `triton.jit`.
        arguments: of each by name its type, as "*bf16" or "i32", or as a number its constant.
            Pointers and integers are taken for multiples of 16, but "i32!" for any number. A
            string that is a constant must be a `tl.constexpr`.
        num_warps: warps of a program.
        gpu: a key of GPUS.
        options: more of the compiler's, as num_stages.
    """
    names = kernel.arg_names
    types = {name: "constexpr" if not isinstance(of, str) else of.rstrip("!")
             for name, of in arguments.items()}
    aligned = [n for n, of in arguments.items()
               if isinstance(of, str) and not of.endswith("!") and of[0] in "*i"]
    return triton.compile(
        ASTSource(
            kernel,
            types,
            {(names.index(n),): of for n, of in arguments.items() if not isinstance(of, str)},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", GPUS[gpu], 32),
        options={"num_warps": num_warps, **options},
    )


def assert_no_spills(program: CompiledKernel, folder: Path, gpu: str = "H100") -> None:
    """Assembles the program, in `folder`, and reads what the assembler says of registers."""
    said = assemble(program, folder, gpu)
    assert NO_SPILLS in said, said


def registers_of(program: CompiledKernel, folder: Path, gpu: str = "H100") -> int:
    """Registers of a thread of the program, which is assembled in `folder`."""
    return int(re.search(r"Used (\d+) registers", assemble(program, folder, gpu))[1])


def assemble(program: CompiledKernel, folder: Path, gpu: str = "H100") -> str:
    """What the assembler says of a program."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not ptxas.exists():
        pytest.skip("this build of Triton brings no ptxas")
    source = folder / "kernel.ptx"
    source.write_text(program.asm["ptx"])
    target = f"sm_{GPUS[gpu]}{'a' if gpu == 'H100' else ''}"
    return subprocess.run(
        [ptxas, "-v", f"--gpu-name={target}", source, "-o", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    ).stderr
