"""The code of the rotary kernels for a GPU that is not here, executed on a CPU; on one, results.

Under the interpreter: interpreted_rotary.py.
"""

import re

import pytest
import torch

from megatron_glm.model.rotary import RotaryTable, rotate_query_key

# Times the largest of the exact result: what the last rounding may cost, and in fp32 two more.
TOLERANCES = {torch.float32: 2**-23, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}
SUM_TOLERANCE = 2**-20
"""At least this for the gradient of the bias: a sum over tokens in fp32."""
pytest.importorskip("triton")
from megatron_glm.model.fused import rotary  # noqa: E402
from tests.compiling import (  # noqa: E402
    GPUS,
    assert_no_spills,
    compile_kernel,
    registers_of,
)
from tests.ptx.kernel import execute_kernels  # noqa: E402


def arguments_of(kernel, dim):
    _, constants = rotary._launch(8192, 32, dim)
    types = {"rotation_pointer": "*fp32", "sums_pointer": "*fp32", "num_tokens": "i32!",
             "num_heads": "i32!", "batch": "i32!", "BIAS": True} | constants

    def type_of(name):
        return types.get(name, "*bf16" if name.endswith("_pointer") else "i32")

    return {name: type_of(name) for name in kernel.arg_names}, constants["num_warps"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name, others", [("rotate_forward", 6), ("rotate_backward", 0)])
def test_every_element_moves_once_in_words_of_16_bytes(name, others, dim, gpu, tmp_path):
    program = compile_kernel(getattr(rotary, name), *arguments_of(getattr(rotary, name), dim), gpu)
    assert_no_spills(program, tmp_path, gpu)
    text = program.asm["ptx"]
    # A half of query, key or value is one word for each thread, one of cosines or sines in fp32
    # two; forward the bias comes to as much as query, key and value.
    assert re.findall(r"ld\.global\S*", text) == ["ld.global.v4.b32"] * (6 + 4 + others)
    assert text.count("st.global.v4.b32") == 6
    # Nothing goes by shared memory but sums, after the last tile.
    assert "st.shared" not in text[: text.rindex("st.global.v4.b32")]


@pytest.mark.parametrize("gpu", GPUS)
def test_the_backward_passes_registers_are_there_for_its_programs(gpu, tmp_path):
    arguments, num_warps = arguments_of(rotary.rotate_backward, 128)
    program = compile_kernel(rotary.rotate_backward, arguments, num_warps, gpu)
    registers = registers_of(program, tmp_path, gpu)
    assert 32 * num_warps * rotary.PROGRAMS_PER_PROCESSOR * registers <= 65536


def assert_equals_torch(device, shape, dtype):
    seq_length, batch, heads, dim = shape
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    position_ids = torch.randint(2048, (batch, seq_length), generator=generator, device=device)
    rotation = RotaryTable(2048, dim, 10000.0, "fp32")(position_ids)
    leaves = random(seq_length, batch, heads, 3 * dim), random(heads * 3 * dim)
    leaves = leaf, bias = [leaf.requires_grad_() for leaf in leaves]
    grads = [random(batch, heads, seq_length, dim).permute(2, 0, 1, 3) for _ in range(3)]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = rotate_query_key(*exact_leaves, rotation.double())
    out = rotary.rotate_query_key_(leaf * 1, bias, rotation)
    actual_grads = torch.autograd.grad(out, leaves, grads)
    exact_grads = torch.autograd.grad(exact, exact_leaves, [grad.double() for grad in grads])
    for actual, expected in zip((*out, *actual_grads), (*exact, *exact_grads), strict=True):
        tolerance = TOLERANCES[dtype]
        if expected.dim() == 1:
            tolerance = max(tolerance, SUM_TOLERANCE)
        assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()
    again = torch.autograd.grad(rotary.rotate_query_key_(leaf * 1, bias, rotation), leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(actual_grads, again, strict=True))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape, dtype", [
    ((9, 2, 20, 128), torch.bfloat16), ((6, 3, 5, 24), torch.float16),
    ((5, 1, 3, 64), torch.float32),
], ids=str)  # fmt: skip
def test_the_compiled_code_equals_torch_in_fp64(shape, dtype, gpu, monkeypatch):
    execute_kernels(monkeypatch, rotary, gpu)
    assert_equals_torch("cpu", shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(300, 2, 32, 128), (100, 3, 5, 24)], ids=str)
def test_on_a_gpu_both_passes_equal_torch_in_fp64(shape, dtype):
    assert_equals_torch("cuda", shape, dtype)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    table = RotaryTable(64, 128, 10000.0, "fp32")
    position_ids = torch.arange(64, device="cuda")[None]
    mixed = torch.randn(64, 1, 2, 3 * 128, device="cuda", requires_grad=True)
    bias = torch.randn(2 * 3 * 128, device="cuda", requires_grad=True)

    def both_passes():
        query, key, value = rotary.rotate_query_key_(mixed * 1, bias, table(position_ids))
        (query + key + value).sum().backward()

    both_passes()  # compiles, and brings the table to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
