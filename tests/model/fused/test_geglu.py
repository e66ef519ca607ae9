"""The code of the GeGLU kernels for a GPU that is not here, executed on a CPU; on one, results.

Under the interpreter: interpreted_geglu.py.
"""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from megatron_glm.model.fused import geglu  # noqa: E402
from tests.compiling import GPUS, assert_no_spills, compile_kernel  # noqa: E402
from tests.ptx.kernel import execute_kernels  # noqa: E402

# Largest error against the largest of the exact result.
TOLERANCES = {torch.float32: 2**-20, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name, loads, stores", [("geglu_forward", 2, 1), ("geglu_backward", 3, 2)])
def test_every_element_moves_once_in_words_of_16_bytes(name, loads, stores, gpu, tmp_path):
    kernel = getattr(geglu, name)
    types = {"sums_pointer": "*fp32", "num_rows": "i32!", "WIDTH": 10880,
             "ROWS_OF_PROGRAM": geglu.ROWS_OF_PROGRAM} | geglu.TILE
    arguments = {name: types.get(name, "*bf16") for name in kernel.arg_names}
    program = compile_kernel(kernel, arguments, geglu.TILE["num_warps"], gpu)
    assert_no_spills(program, tmp_path, gpu)
    text = program.asm["ptx"]
    # A thread has 8 elements of a tile; loads stand before the loop and in it.
    assert len(re.findall(r"cp\.async\.cg", text)) == loads * geglu.TILE["STAGES"]
    assert len(re.findall(r"st\.global\.v4\.b32", text)) == stores
    # They are computed with as they were loaded: none on its own, none twice.
    assert not re.search(r"ld\.shared\.b16", text) and text.count("ex2.approx") == 8


def assert_equals_torch(device, num_rows, width, dtype):
    torch.manual_seed(0)
    x = torch.randn(num_rows, 2 * width, device=device).to(dtype).requires_grad_()
    bias = torch.randn(2 * width, device=device).to(dtype).requires_grad_()
    grad = torch.randn(num_rows, width, device=device).to(dtype)
    exact_x, exact_bias = (leaf.detach().double().requires_grad_() for leaf in (x, bias))

    out = geglu.bias_geglu(x, bias)
    out.backward(grad)
    first, second = (exact_x + exact_bias).chunk(2, dim=-1)
    exact = F.gelu(first) * second
    exact.backward(grad.double())

    for actual, expected in ((out, exact), (x.grad, exact_x.grad), (bias.grad, exact_bias.grad)):
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("num_rows, width, dtype", [
    (150, 136, torch.bfloat16), (30, 50, torch.float16), (3, 33, torch.float32),
], ids=str)  # fmt: skip
def test_the_compiled_code_equals_torch_in_fp64(num_rows, width, dtype, gpu, monkeypatch):
    execute_kernels(monkeypatch, geglu, gpu)
    assert_equals_torch("cpu", num_rows, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("width", [50, 10880])
def test_on_a_gpu_both_passes_equal_torch_in_fp64(width, dtype):
    assert_equals_torch("cuda", 600, width, dtype)
