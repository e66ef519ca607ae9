"""The projection of query, key and value: whose bias is added by whom, and that nothing changes."""

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention

from megatron_glm.model.rotary import RotaryTable, rotate_query_key
from tests.model.building import build_glm
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
SEQUENCE, BATCH = 6, 2


class AddsItsBias(torch.nn.Module):
    """As Transformer Engine's linears do in the product."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias), None


def projections(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """By way: query, key, value, and the gradients of input, weight and bias."""
    torch.manual_seed(0)
    (glm,) = build_glm(num_layers=1, params_dtype=dtype)
    attention = glm.decoder.layers[0].self_attention
    linear = attention.linear_qkv
    torch.nn.init.normal_(linear.bias)
    rotation = RotaryTable(SEQUENCE, 16, 10000.0, "fp32")(torch.arange(SEQUENCE).expand(BATCH, -1))
    hidden = torch.randn(SEQUENCE, BATCH, 64, dtype=dtype, requires_grad=True)
    grads = torch.randn(3, SEQUENCE, BATCH, 4, 16, dtype=dtype).unbind()
    leaves = hidden, linear.weight, linear.bias
    calls = []
    # What gathers parameters ahead of their use hangs on the module that owns them.
    linear.register_forward_pre_hook(lambda *_: calls.append(1))

    def measured(out):
        return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, grads)]

    product, bias = linear(hidden)
    assert bias is linear.bias
    assert torch.equal(product, hidden @ linear.weight.t())
    found = {"ours": measured(attention.get_query_key_value_tensors(hidden, rotation))}
    assert len(calls) == 2
    linear.skip_bias_add = False
    mixed, _ = SelfAttention.get_query_key_value_tensors(attention, hidden, split_qkv=False)
    found["Megatron's"] = measured(rotate_query_key(mixed, None, rotation))
    attention.linear_qkv = AddsItsBias(linear)
    found["of a linear that adds its bias"] = measured(
        attention.get_query_key_value_tensors(hidden, rotation)
    )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bias_is_added_once_with_megatrons_bits(dtype):
    ours, megatrons, others = run_ranks(projections, dtype, world_size=1)[0].values()
    for actual, expected, other in zip(ours, megatrons, others, strict=True):
        assert torch.equal(actual, expected)
        tolerance = 4 * torch.finfo(dtype).eps
        assert (other - expected).abs().max() <= tolerance * expected.abs().max()
