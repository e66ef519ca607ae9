"""A GPU that computes nothing, on which programs run whole: `run_on_null_gpu(program, *flags)`.

CUDA's libraries are replaced by null_gpu.c in a process of its own, what CuTe's kernels call by
null_cute.c. Everything else is what runs on a GPU: the choice of patches, torch's checks of devices
and types, its allocator, autograd's threads, the compilers of Triton, Inductor and CuTe, which make
code for an H200, and the launch of what they have made. So a program that stops there for another
reason than its numbers, which are zeros and leftovers, stops on a GPU as well, and its memory and
its waits are those of a GPU.
"""

import atexit
import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
LIBRARY = "libcuda.so.1"
CUTE_LIBRARY = "libcute_dsl_runtime.so"
# torch's libraries that call CUDA, and what they and Triton's driver call.
CALLERS = ("torch_cuda", "c10_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc")
CALLED = re.compile(r"\b((?:__)?cuda[A-Z]\w+|cublas\w+|nccl\w+|cu(?!File)[A-Z][a-z]\w*)\b")
# Runs the program and ends at once, with its status: torch's own end waits for a NCCL that is none,
# and its hook for what nobody catches prints nothing without one.
RUNNER = """
import os, sys, traceback
status, program = 0, sys.argv.pop(1)
try:
    exec(compile(program, "program", "exec"))
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


def run_on_null_gpu(
    program: str, *flags: str, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Runs Python code, one rank, with `flags` as its sys.argv[1:]; skips the test where the null
    GPU cannot be built."""
    folder = str(_build())
    environment = os.environ | {
        "LD_PRELOAD": f"{folder}/{LIBRARY}", "LD_LIBRARY_PATH": folder,
        "TRITON_LIBCUDA_PATH": folder, "CUTE_DSL_LIBS": f"{folder}/{CUTE_LIBRARY}",
        "CUDA_VISIBLE_DEVICES": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        # At the end Inductor would wait 300 s for compilers of its own that do not stop.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", RUNNER, program, *flags], cwd=ROOT, env=environment,
        timeout=timeout, capture_output=True, text=True,
    )


def count_of(what: str) -> int:
    """So far: `waits` of the host for the device, `launches` of kernels and copies by the host
    itself, its `graph_launches`, and the `nodes_launched` by these; for the program that runs
    there."""
    return getattr(ctypes.CDLL(None), f"null_gpu_{what}")()


def num_waits() -> int:
    """How often the host has waited for the device so far; for the program that runs there."""
    return count_of("waits")


@functools.cache
def _build() -> Path:
    site_packages = Path(torch.__file__).parents[1]
    headers = [site_packages / "nvidia/cu13/include",
               site_packages / "triton/backends/nvidia/include"]
    compiler = shutil.which("gcc")
    if compiler is None or not all(path.exists() for path in headers):
        pytest.skip("the null GPU needs gcc, and CUDA 13's headers as torch's wheels bring them")
    folder = Path(tempfile.mkdtemp(prefix="null_gpu"))
    atexit.register(shutil.rmtree, folder)
    source = Path(__file__).with_suffix(".c")
    rest = folder / "rest.c"
    rest.write_text("".join(
        # Weak: null_gpu.c has the last word.
        f"__attribute__((weak)) int {name}(void) {{ return 0; }}\n"
        for name in sorted(_called(site_packages))
    ))
    include = [f"-I{path}" for path in headers]
    compile_library = [compiler, "-shared", "-fPIC", "-O1", "-w", *include]
    subprocess.run(
        [*compile_library, source, rest, "-o", folder / LIBRARY, f"-Wl,-soname,{LIBRARY}", "-ldl",
         "-lpthread"],
        check=True,
    )  # fmt: skip
    cute = source.with_name("null_cute.c")
    subprocess.run([*compile_library, cute, "-o", folder / CUTE_LIBRARY], check=True)
    # By this name Triton's linker looks for it.
    (folder / "libcuda.so").symlink_to(LIBRARY)
    return folder


def _called(site_packages: Path) -> set[str]:
    """CUDA's functions that torch and Triton call."""
    libraries = [site_packages / f"torch/lib/lib{name}.so" for name in CALLERS]
    found = subprocess.run(["nm", "-D", "--undefined-only", *libraries], check=True,
                           capture_output=True, text=True)
    driver = site_packages / "triton/backends/nvidia/driver.c"
    return set(CALLED.findall(found.stdout + driver.read_text())) - {"cudaError_t"}
