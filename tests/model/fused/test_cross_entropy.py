"""The code of the cross entropy kernels for a GPU that is not here, executed on a CPU; on one,
their results.

Under the interpreter, on two ranks too: interpreted_cross_entropy.py.
"""

import re
from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from megatron_glm.model.fused import cross_entropy  # noqa: E402
from tests.compiling import GPUS, assert_no_spills, compile_kernel  # noqa: E402
from tests.ptx.kernel import execute_kernels  # noqa: E402


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name, stores", [("row_statistics", 0), ("overwrite_by_gradient", 2)])
def test_logits_move_once_in_words_of_16_bytes(name, stores, gpu, tmp_path):
    kernel = getattr(cross_entropy, name)
    types = {"logits_pointer": "*bf16", "target_pointer": "*i64", "vocab_start": "i32",
             "width": "i32", "BLOCK": cross_entropy.BLOCK}
    program = compile_kernel(
        kernel, {name: types.get(name, "*fp32") for name in kernel.arg_names},
        cross_entropy.NUM_WARPS, gpu,
    )
    assert_no_spills(program, tmp_path, gpu)
    text = program.asm["ptx"]
    moves = Counter(re.findall(r"(?:ld|st)\.global\S*", text))
    assert moves["ld.global.v4.b32"] == 2 and moves["st.global.v4.b32"] == stores
    # From block to block of a row, no warp waits for another.
    assert "bar.sync" not in text.rpartition("bra")[0]


# Largest error of the gradient against the largest of the exact one.
TOLERANCES = {torch.float32: 2**-20, torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}


def assert_equals_torch(device, shape, dtype):
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device).mul(3).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator, device=device)
    grad = torch.rand(shape[:-1], generator=generator, device=device)
    exact_leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_leaf.flatten(0, 1), target.flatten(), reduction="none")
    exact.backward(grad.double().flatten())

    made = logits.requires_grad_() * 1
    with extra_memory_below(made.nbytes / 8) if device == "cuda" else nullcontext():
        losses = cross_entropy.vocab_parallel_cross_entropy(made, target)
        (gradient,) = torch.autograd.grad(losses, made, grad)
    torch.testing.assert_close(losses.double().flatten(), exact.detach(), rtol=1e-6, atol=1e-5)
    error = (gradient.double() - exact_leaf.grad).abs().max()
    assert error <= TOLERANCES[dtype] * exact_leaf.grad.abs().max()


@contextmanager
def extra_memory_below(limit):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield
    assert torch.cuda.max_memory_allocated() - before < limit


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape, dtype", [
    ((3, 2, 4200), torch.bfloat16), ((5, 1, 333), torch.float16), ((5, 1, 64), torch.float32),
], ids=str)  # fmt: skip
def test_the_compiled_code_equals_torch_in_fp64(shape, dtype, gpu, monkeypatch):
    execute_kernels(monkeypatch, cross_entropy, gpu)
    assert_equals_torch("cpu", shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [(512, 2, 50304), (30, 3, 1001)], ids=str)
def test_on_a_gpu_both_passes_equal_torch_in_fp64(shape, dtype):
    assert_equals_torch("cuda", shape, dtype)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    logits = torch.randn(16, 2, 1000, device="cuda", requires_grad=True)
    target = torch.zeros(16, 2, dtype=torch.int64, device="cuda")

    def both_passes():
        cross_entropy.vocab_parallel_cross_entropy(logits * 1, target).sum().backward()

    both_passes()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
