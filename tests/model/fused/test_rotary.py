"""The code of the rotary kernels for a GPU that is not here, and on one that is, their results.

Under the interpreter: interpreted_rotary.py.
"""

import re

import pytest
import torch

from megatron_glm.model.rotary import RotaryTable, rotate_query_key

# Times the largest of the exact result: what the last rounding may cost, and in fp32 two more.
TOLERANCES = {torch.float32: 2**-23, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}
pytest.importorskip("triton")
from megatron_glm.model.fused import rotary  # noqa: E402
from tests.model.fused.compiling import GPUS, assert_no_spills, compile_kernel  # noqa: E402


def arguments_of(kernel, dim):
    _, constants = rotary._launch(8192, 32, dim)
    types = {"rotation_pointer": "*fp32", "num_heads": "i32!", "batch": "i32!"} | constants

    def type_of(name):
        return types.get(name, "*bf16" if name.endswith("_pointer") else "i32")

    return {name: type_of(name) for name in kernel.arg_names}, constants["num_warps"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name, accesses", [("rotate_forward", 8), ("rotate_backward", 12)])
def test_every_element_moves_once_in_words_of_16_bytes(name, accesses, dim, gpu, tmp_path):
    program = compile_kernel(getattr(rotary, name), *arguments_of(getattr(rotary, name), dim), gpu)
    assert_no_spills(program, tmp_path, gpu)
    # Each half of query and key (and value) is one word for each thread; the rest is fp32 cosines
    # and sines, two words each.
    moves = re.findall(r"(?:ld|st)\.global\S*", program.asm["ptx"])
    assert set(moves) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert len(moves) == accesses + 4
    assert program.metadata.shared == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(300, 2, 32, 128), (100, 3, 5, 24)], ids=str)
def test_on_a_gpu_both_passes_equal_torch_in_fp64(shape, dtype):
    seq_length, batch, heads, dim = shape
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)

    position_ids = torch.randint(2048, (batch, seq_length), generator=generator, device="cuda")
    rotation = RotaryTable(2048, dim, 10000.0, "fp32")(position_ids)
    leaf = random(seq_length, batch, heads, 3 * dim).requires_grad_()
    grads = [random(batch, heads, seq_length, dim).permute(2, 0, 1, 3) for _ in range(3)]
    exact_leaf = leaf.detach().double().requires_grad_()
    exact = rotate_query_key(exact_leaf, rotation.double())
    torch.autograd.backward(exact, [grad.double() for grad in grads])
    out = rotary.rotate_query_key_(leaf * 1, rotation)
    torch.autograd.backward(out, grads)
    for actual, expected in zip((*out, leaf.grad), (*exact, exact_leaf.grad), strict=True):
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    table = RotaryTable(64, 128, 10000.0, "fp32")
    position_ids = torch.arange(64, device="cuda")[None]
    mixed = torch.randn(64, 1, 2, 3 * 128, device="cuda", requires_grad=True)

    def both_passes():
        query, key, value = rotary.rotate_query_key_(mixed * 1, table(position_ids))
        (query + key + value).sum().backward()

    both_passes()  # compiles, and brings the table to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
