"""The code of decode's attention for a GPU that is not here. More results:
interpreted_decode_attention.py."""

import pytest
import torch

pytest.importorskip("triton")
from megatron_glm.inference import decode_attention  # noqa: E402
from tests.compiling import GPUS, assert_no_spills, compile_kernel, registers_of  # noqa: E402
from tests.inference.naive_decode_attention import assert_attends, random_step  # noqa: E402
from tests.ptx.kernel import execute_kernels  # noqa: E402

FP32 = dict.fromkeys(
    ("rotation_pointer", "parts_pointer", "tops_pointer", "sums_pointer"), "*fp32"
) | {"places_pointer": "*i64", "capacity": "i32", "num_parts": "i32!"}
CONSTANTS = {
    "DIM": 128, "HALF": 64, "SIZE": 128, "PART": decode_attention.PART,
    "MERGED": decode_attention.MERGED,
}  # fmt: skip


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("name", ["attend_to_part", "merge_parts"])
def test_heads_of_128_stay_in_registers(name, gpu, tmp_path):
    kernel = getattr(decode_attention, name)
    types = FP32 | CONSTANTS
    arguments = {argument: types.get(argument, "*bf16") for argument in kernel.arg_names}
    program = compile_kernel(kernel, arguments, 4, gpu)
    assert_no_spills(program, tmp_path, gpu)
    # Four programs of a processor and more.
    assert registers_of(program, tmp_path, gpu) <= 128
    # Keys and values are read in words of 16 bytes.
    assert name == "merge_parts" or program.asm["ptx"].count("ld.global.v4") >= 4


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype, head_dim, tolerance", [
    (torch.float16, 32, 2**-10), (torch.bfloat16, 20, 2**-7), (torch.float32, 64, 2**-19),
], ids=str)  # fmt: skip
def test_the_compiled_code_attends(dtype, head_dim, tolerance, gpu, monkeypatch):
    execute_kernels(monkeypatch, decode_attention, gpu)
    part = decode_attention.PART
    step = random_step([0, part - 1, part, 2 * part + 7], 2, head_dim, 256, dtype)
    assert_attends(step, tolerance)
