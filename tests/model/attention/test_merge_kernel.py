"""The compiled code of the kernel that merges two parts of an attention, executed on a CPU."""

import pytest
import torch

pytest.importorskip("triton")
from megatron_glm.model.attention import merge_kernel  # noqa: E402
from megatron_glm.model.attention.cudnn import merge  # noqa: E402
from tests.compiling import GPUS  # noqa: E402
from tests.ptx.kernel import execute_kernels  # noqa: E402


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("heads, dim, dtype", [
    (3, 24, torch.bfloat16), (40, 128, torch.float16), (2, 8, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("are_outputs", [True, False], ids=["outputs", "gradients"])
def test_the_compiled_code_equals_torch_in_fp64(heads, dim, dtype, are_outputs, gpu, monkeypatch):
    execute_kernels(monkeypatch, merge_kernel, gpu)
    generator = torch.Generator().manual_seed(0)
    shape = (6, 2, heads)
    x, other = (torch.randn(*shape, dim, generator=generator).to(dtype) for _ in range(2))
    lse, other_lse = (20 * torch.randn(shape, generator=generator) for _ in range(2))
    origin = torch.tensor([0, 1, 2], dtype=torch.int8).repeat(4).view(6, 2)
    # What neither part has written.
    x[origin == 2], lse[origin == 2] = torch.nan, torch.nan
    other[origin == 0], other_lse[origin == 0] = torch.nan, torch.nan

    both = torch.stack((lse, other_lse)).double().nan_to_num(-torch.inf)
    weights = both.softmax(0) if are_outputs else torch.ones_like(both)
    values = torch.stack((x, other)).double().nan_to_num()
    expected, expected_lse = (weights[..., None] * values).sum(0), both.logsumexp(0)

    merge(origin, x, other, *((lse, other_lse) if are_outputs else ()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.double(), expected, rtol=eps, atol=2**-20)
    if are_outputs:
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2**-22, atol=2**-20)
