"""Tensors that Megatron wants on a GPU are made where there is one to hold them."""

import pytest
import torch

import patches

pytestmark = pytest.mark.skipif(
    "cpu_placement" not in patches.apply(), reason="there is a GPU, where nothing is patched"
)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_cuda_device_is_the_cpu(device):
    made = [
        torch.zeros(2, device=device),
        torch.tensor([1.0], device=device),
        torch.empty_like(torch.ones(2), device=device),
        torch.ones(2).to(device),
        torch.ones(2).to(device=device, dtype=torch.float64),
        torch.ones(2).cuda(),
        torch.nn.Linear(2, 2).to(device).weight,
        torch.nn.Linear(2, 2).cuda().weight,
    ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_a_dtype_still_reaches_to():
    assert torch.ones(2).to(torch.float16).dtype == torch.float16
    assert torch.ones(2).to("cuda", torch.float16).dtype == torch.float16


def test_other_devices_and_the_device_context_are_untouched():
    assert torch.zeros(2, device="meta").is_meta
    with torch.device("meta"):
        assert torch.zeros(2).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta


def test_a_compiled_function_may_name_a_cuda_device():
    @torch.compile(fullgraph=True, backend="eager")
    def shifted(x):
        return x + torch.ones(3, device="cuda")

    assert torch.equal(shifted(torch.ones(3)), torch.full((3,), 2.0))
