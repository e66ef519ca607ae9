"""The code of the residual norm's kernels for a GPU that is not here, executed on a CPU; on one,
their results. Under the interpreter: interpreted_residual_norm.py."""

import re

import pytest
import torch
import torch.nn.functional as F

from megatron_glm.model.dropout import draw_dropout, drop_channels
from megatron_glm.model.residual import Sum

pytest.importorskip("triton")
from megatron_glm.model.fused import residual_norm  # noqa: E402
from megatron_glm.model.fused import residual_norm_kernels as kernels  # noqa: E402
from tests.compiling import (  # noqa: E402
    GPUS,
    assert_no_spills,
    compile_kernel,
    registers_of,
)
from tests.ptx.kernel import execute_kernels  # noqa: E402

# Largest error against the largest of the exact result: in 16 bits z and y are both rounded.
TOLERANCES = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}
WIDTHS = (768, 2048, 4096, 12288)
PARTS = {"sum and norm": (True, True), "norm": (False, True), "sum": (True, False)}
FP32 = ("mean", "rstd", "slope_mean", "product_mean", "sums")


def arguments_of(kernel, element: str, **constants) -> dict[str, str | int]:
    """Types of a kernel's arguments by their names."""
    def type_of(name):
        if not name.endswith("_pointer"):
            return {"num_rows": "i32!", "threshold": "i32!"}.get(name, "fp32")
        kind = name.removesuffix("_pointer")
        return "*i32" if kind == "seed" else "*fp32" if kind in FP32 else f"*{element}"

    return {name: type_of(name) for name in kernel.arg_names} | constants


def compiled_backward(columns: int, has_sum: bool, has_norm: bool, element="bf16", gpu="H100"):
    tiles = residual_norm.tiles_of(8192, columns, 132)
    arguments = arguments_of(
        kernels.backward, element, COLUMNS=columns, SUM=has_sum, NORM=has_norm, DROPOUT=has_sum,
        ROWS=tiles.ROWS, BLOCK=tiles.BLOCK, STAGES=residual_norm.STAGES,
    )
    return compile_kernel(kernels.backward, arguments, tiles.num_warps, gpu)


@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("columns", WIDTHS)
def test_the_forward_pass_holds_two_rows_without_spilling(columns, element, tmp_path):
    constants, num_warps = residual_norm.row_of(columns)
    arguments = arguments_of(
        kernels.forward, element, SUM=True, NORM=True, DROPOUT=True, **constants
    )
    program = compile_kernel(kernels.forward, arguments, num_warps)
    assert_no_spills(program, tmp_path)
    # Of two rows one is loaded while the other is worked on.
    assert 2 * 32 * num_warps * registers_of(program, tmp_path) <= 65536


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("parts", PARTS)
def test_the_backward_pass_does_not_spill(parts, columns, tmp_path):
    assert_no_spills(compiled_backward(columns, *PARTS[parts]), tmp_path)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_backward_pass_moves_words_of_16_bytes(gpu):
    # A thread of a block of 2048 columns has 8 of them: one word of each tensor.
    text = compiled_backward(2048, True, True, gpu=gpu).asm["ptx"]
    # Three tensors are read, before the loop and in it, while what came before is worked on.
    assert len(re.findall(r"cp\.async\.cg", text)) == 3 * residual_norm.STAGES
    assert set(re.findall(r"st\.global\S*", text)) == {"st.global.v4.b32"}


@pytest.mark.parametrize("columns", [64, 768, 4096, 5120, 12288])
@pytest.mark.parametrize("rows", [1, 7, 8192])
def test_programs_of_the_backward_pass_cover_a_gpu_and_no_more(rows, columns):
    tiles = residual_norm.tiles_of(rows, columns, processors=132)
    blocks = -(-columns // tiles.BLOCK)
    assert tiles.BLOCK >= columns or columns > residual_norm.WHOLE_ROW
    assert 1 <= tiles.programs <= -(-rows // tiles.ROWS)
    assert tiles.programs * blocks <= 8 * 132 + blocks
    if rows == 8192:
        assert tiles.programs * blocks >= 132


def assert_equals_torch(device, rows, columns, dtype, dropout):
    torch.manual_seed(0)
    drawn = draw_dropout(dropout, torch.device(device))
    shapes = [(rows, columns), (columns,), (rows, columns), (columns,), (columns,)]
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grads = [torch.randn(shapes[0], device=device).to(dtype) for _ in range(2)]

    y, residual = residual_norm.residual_norm(Sum(*leaves[:3], 4.0, drawn), *leaves[3:], 1e-5)
    torch.autograd.backward((y, residual), grads)
    x, bias, added = exact_leaves[:3]
    z = 4.0 * added + drop_channels(x + bias, drawn)
    exact = F.layer_norm(z, (columns,), *exact_leaves[3:], 1e-5)
    exact.backward(grads[0].double() + grads[1].double())

    pairs = [(y, exact)] + [
        (leaf.grad, other.grad) for leaf, other in zip(leaves, exact_leaves, strict=True)
    ]
    for actual, expected in pairs:
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCES[dtype] * expected.abs().max()


# The last are wider than a whole row of the backward pass.
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("rows, columns, dtype, dropout", [
    (20, 104, torch.bfloat16, 0.1), (9, 768, torch.float16, 0.0), (9, 75, torch.float32, 0.1),
    (10, 4104, torch.bfloat16, 0.1),
], ids=str)  # fmt: skip
def test_the_compiled_code_equals_torch_in_fp64(rows, columns, dtype, dropout, gpu, monkeypatch):
    execute_kernels(monkeypatch, kernels, gpu)
    assert_equals_torch("cpu", rows, columns, dtype, dropout)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("columns", [100, 768, 4096, 12288])
def test_on_a_gpu_all_gradients_equal_torch_in_fp64(columns, dtype, dropout):
    assert_equals_torch("cuda", 600, columns, dtype, dropout)
