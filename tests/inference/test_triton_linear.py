"""The code of the kernels of INT8 and INT4 weights for a GPU that is not here, and the engine with
them on one that computes nothing. More results: interpreted_triton_linear.py,
test_linear.py."""

import re

import pytest
import torch

pytest.importorskip("triton")
from megatron_glm.inference import quantized_kernels as kernels  # noqa: E402
from megatron_glm.inference import triton_linear  # noqa: E402
from tests.compiling import GPUS, assert_no_spills, compile_kernel  # noqa: E402
from tests.inference.test_linear import dequantized, random_weight  # noqa: E402
from tests.null_gpu import run_on_null_gpu  # noqa: E402
from tests.ptx.kernel import execute_kernels  # noqa: E402

# Half a unit in the last place of the largest number, and what sums in fp32 add.
TOLERANCES = {torch.float16: 1.01 * 2**-11, torch.bfloat16: 1.01 * 2**-8}
# Of a program on an RTX 3090, bytes.
SMALLEST_SHARED_MEMORY = 99 * 1024


def compiled(bits, tokens, groups, element, gpu):
    constants = {
        "NUM_ROWS": 9216, "WIDTH": 12288, "GROUPS": groups, "BITS": bits, "TOKENS": tokens,
        "SLICES": triton_linear.SLICES[tokens], **triton_linear.TILE._asdict(),
    }  # fmt: skip
    types = {"words_pointer": "*i32", "scales_pointer": "*fp16", "num_tokens": "i32!"} | constants
    arguments = {name: types.get(name, f"*{element}") for name in kernels.multiply.arg_names}
    return compile_kernel(kernels.multiply, arguments, triton_linear.SLICES[tokens], gpu)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("bits, tokens, groups, element", [
    (8, 8, 1, "bf16"), (4, 8, 1, "fp16"), (4, 16, 1, "bf16"), (8, 32, 96, "fp16"),
    (4, 32, 96, "bf16"),
])  # fmt: skip
def test_codes_go_from_memory_to_the_tensor_cores(bits, tokens, groups, element, gpu, tmp_path):
    program = compiled(bits, tokens, groups, element, gpu)
    assert_no_spills(program, tmp_path, gpu)
    assert program.metadata.shared <= SMALLEST_SHARED_MEMORY
    loop = re.search(r"scf\.for .*?scf\.yield", program.asm["ttgir"], re.DOTALL)[0]
    assert loop.count("tt.dot ") == 16 // bits
    # What is read goes straight to shared memory, while other words are worked on, in words of 16
    # bytes, and from there to the registers of the tensor cores; only scales of groups do not.
    copies = [loop.count(op) for op in ("async_copy_global_to_local", "tt.load", "convert_layout")]
    assert copies == [1 + 16 // bits, groups > 1, groups > 1]
    sizes = re.findall(r"cp\.async\S* \[[^]]*\], \[[^]]*\], (\w+)", program.asm["ptx"])
    assert set(sizes) == {"0x10"}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("bits, dtype, shape, groups, count", [
    (8, torch.bfloat16, (37, 1536), 1, 5), (4, torch.float16, (37, 1536), 1, 8),
    (8, torch.float16, (64, 3072), 1, 13), (4, torch.bfloat16, (37, 1536), 12, 11),
    (4, torch.bfloat16, (37, 3072), 1, 40), (8, torch.float16, (37, 1536), 4, 32),
    (4, torch.float16, (37, 90), 3, 3), (8, torch.bfloat16, (5, 90), 18, 3),
], ids=str)  # fmt: skip
def test_the_compiled_code_multiplies_and_dequantizes(
    bits, dtype, shape, groups, count, gpu, monkeypatch
):
    execute_kernels(monkeypatch, kernels, gpu)
    weight = random_weight(bits, *shape, groups)
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    # Without its first row, x of 90 columns is not aligned.
    x = torch.randn(count + 1, shape[1], generator=generator).to(dtype)[1:]
    linear = triton_linear.TritonLinear(weight.codes, weight.scales, bias, bits, dtype)
    exact = x.double() @ dequantized(weight).T + bias.double()
    error = (linear(x).double() - exact).abs().max()
    assert error <= TOLERANCES[dtype] * exact.abs().max()
    rows = slice(1, 4)
    assert torch.equal(linear.weight(rows, dtype), dequantized(weight)[rows].to(dtype))


PROGRAM = """
import sys, torch
from benchmarks import decode
from megatron_glm.inference import quantized_kernels as kernels

class Counted:
    def __init__(self, name):
        self.name, self.kernel, self.count = name, getattr(kernels, name), 0
        setattr(kernels, name, self)
    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]

# It would be asked for attention, and is not there.
torch.backends.cuda.enable_cudnn_sdp(False)
counted = [Counted(name) for name in ("multiply", "dequantize")]
decode.main(sys.argv[1:])
print("calls", *(each.count for each in counted))
"""


def test_decoding_on_a_gpu_launches_the_kernels(tmp_path):
    done = run_on_null_gpu(
        PROGRAM, "--device", "cuda", "--forms", "int8", "int4-fp16", "--num-layers", "1",
        "--hidden-size", "64", "--ffn-hidden-size", "176", "--num-attention-heads", "4",
        "--vocab-size", "256", "--context", "130", "--batches", "1", "--steps", "2",
        "--rounds", "1", "--prefill-rounds", "1", "--results", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0 and "Error" not in done.stdout, done.stdout + done.stderr
    # Of four linears each: a context of many tokens; what later steps launch is compiled by then.
    assert done.stdout.splitlines()[-1] == "calls 8 8"
