"""The Triton kernels: their code for a GPU that is not here, executed on a CPU where that GPU
has no tensor cores that are asynchronous. More results: interpreted_triton.py.

On a GPU, test_backends.py and test_conformance.py run them as well.
"""

import pytest
import torch
import triton.language as tl

from megatron_glm.model import dropout, dropout_kernels
from megatron_glm.model.attention import triton, triton_kernels
from megatron_glm.model.dropout import Dropout
from tests.compiling import NO_SPILLS, assemble, compile_kernel
from tests.model.attention.packs import random_inputs, run, samples_from
from tests.ptx.kernel import execute_kernels

LIMITS = {
    "H100": {"capability": (9, 0), "shared_memory": 232448},
    "A100": {"capability": (8, 0), "shared_memory": 166912},
}


def compiled(kernel: str, dims: int, has_dropout: bool, gpu: str):
    """A kernel for bf16, compiled for a GPU that need not be there."""
    function = getattr(triton_kernels, kernel)
    launch = triton.launch_of(kernel, dims, 2, **LIMITS[gpu])
    constants = {"HEAD_DIM": dims, "DIMS": dims, "DROPOUT": has_dropout,
                 "PRECISION": tl.constexpr("tf32"), "BLOCK_M": launch.BLOCK_M,
                 "BLOCK_N": launch.BLOCK_N}  # fmt: skip
    words = ("key_start", "key_end", "query_start", "query_end", "seed")

    def type_of(name):
        if name.endswith("_pointer"):
            kind = name.removesuffix("_pointer")
            return "*fp32" if kind in ("lse", "delta") else "*i32" if kind in words else "*bf16"
        if name in ("scale", "softmax_scale", "keep_factor"):
            return "fp32"
        return "i32!" if name in ("num_heads", "threshold") else "i32"

    types = {name: type_of(name) for name in function.arg_names}
    return compile_kernel(
        function, types | constants, launch.num_warps, gpu, num_stages=launch.num_stages
    )


@pytest.mark.parametrize("gpu", LIMITS)
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_kernels_compile_and_fit_the_shared_memory(kernel, gpu):
    program = compiled(kernel, 128, True, gpu)
    assert program.metadata.shared <= LIMITS[gpu]["shared_memory"]
    # Hopper's own matrix instruction, or its speed is out of reach.
    assert ("wgmma" in program.asm["ptx"]) == (gpu == "H100")


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_code_for_hopper_neither_spills_nor_serialises(kernel, has_dropout, tmp_path):
    said = assemble(compiled(kernel, 128, has_dropout, "H100"), tmp_path)
    assert NO_SPILLS in said and "serialized" not in said


@pytest.mark.parametrize("dtype, dim, dropout", [
    (torch.bfloat16, 64, Dropout(0.3, torch.tensor([20221005, -7], dtype=torch.int32))),
    (torch.float16, 24, None),
], ids=str)  # fmt: skip
def test_the_compiled_code_for_ampere_equals_the_reference_in_fp64(
    dtype, dim, dropout, monkeypatch
):
    execute_kernels(monkeypatch, triton_kernels, "A100")
    monkeypatch.setattr(triton, "_limits", lambda device: tuple(LIMITS["A100"].values()))
    samples = samples_from([[(137, 70), (1, 0), (1, 1), (60, 60)]])
    mixed, grad = (x.to(dtype) for x in random_inputs(samples, 2, dim))
    exact = run("reference", mixed.double(), grad.double(), samples, dropout)
    for actual, expected in zip(run("triton", mixed, grad, samples, dropout), exact, strict=True):
        error = (actual.double() - expected).abs().max()
        # Probabilities and their gradients are rounded before products, and what comes of them.
        assert error <= torch.finfo(dtype).eps * expected.abs().max()


def test_the_hash_has_one_set_of_constants():
    words = {"MIX_0": dropout.MIX[0], "MIX_1": dropout.MIX[1], "HASH_0": dropout.HASH[0],
             "HASH_1": dropout.HASH[1], "GOLDEN": dropout.GOLDEN}
    for name, word in words.items():
        assert getattr(dropout_kernels, name).value == word % 2**32


@pytest.mark.parametrize("gpu", [
    *LIMITS.values(), {"capability": (7, 5), "shared_memory": 65536},
])  # fmt: skip
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("dims", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kernel", ["forward", "backward_queries", "backward_keys"])
def test_blocks_are_powers_of_two_that_tile(kernel, dims, element_size, gpu):
    launch = triton.launch_of(kernel, dims, element_size, **gpu)
    assert launch.BLOCK_M in (16, 32, 64, 128) and launch.BLOCK_N in (16, 32, 64, 128)
    assert 1 <= launch.num_stages <= 3
