"""The code of the cross entropy kernels for a GPU that is not here, and on one, their results.

Under the interpreter, on two ranks too: interpreted_cross_entropy.py.
"""

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from megatron_glm.model.fused import cross_entropy  # noqa: E402
from tests.compiling import GPUS, assert_no_spills, compile_kernel  # noqa: E402


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
    moves = Counter(re.findall(r"(?:ld|st)\.global\S*", program.asm["ptx"]))
    assert moves["ld.global.v4.b32"] == 2 and moves["st.global.v4.b32"] == stores


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float32, 2**-20), (torch.float16, 1.01 * 2**-11), (torch.bfloat16, 1.01 * 2**-8)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(512, 2, 50304), (30, 3, 1001)], ids=str)
def test_on_a_gpu_both_passes_equal_torch_in_fp64(shape, dtype, tolerance):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(shape, generator=generator, device="cuda").mul(3).to(dtype)
    target = torch.randint(shape[-1], shape[:-1], generator=generator, device="cuda")
    grad = torch.rand(shape[:-1], generator=generator, device="cuda")
    exact_leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(exact_leaf.flatten(0, 1), target.flatten(), reduction="none")
    exact.backward(grad.double().flatten())

    made = logits.requires_grad_() * 1
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    losses = cross_entropy.vocab_parallel_cross_entropy(made, target)
    (gradient,) = torch.autograd.grad(losses, made, grad)
    assert torch.cuda.max_memory_allocated() - before < made.nbytes / 8
    torch.testing.assert_close(losses.double().flatten(), exact.detach(), rtol=1e-6, atol=1e-5)
    error = (gradient.double() - exact_leaf.grad).abs().max()
    assert error <= tolerance * exact_leaf.grad.abs().max()


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
