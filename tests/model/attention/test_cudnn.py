"""The cuDNN backend: refusals, and on a GPU what others cannot show. Its parts under emulation:
interpreted_cudnn.py."""

import pytest
import torch

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import load_backend
from megatron_glm.model.dropout import draw_dropout
from tests.model.attention.libraries import skip_without_library
from tests.model.attention.packs import random_inputs, run, samples_from

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "dtype, dim, message",
    [(torch.float32, 16, "not in torch.float32; pass --bf16 or --fp16"),
     (torch.bfloat16, 12, "head dimension 12 must be a multiple of 8 up to 128"),
     (torch.bfloat16, 256, "head dimension 256 must be a multiple of 8 up to 128")],
)  # fmt: skip
def test_refusals_name_the_backend(dtype, dim, message):
    samples = samples_from([[(4, 2)]])
    query = torch.zeros(4, 1, 1, dim, dtype=dtype)
    with pytest.raises(GLMError, match="--glm-attention-backend cudnn: .*" + message):
        load_backend("cudnn")(query, query, query, samples, softmax_scale=1.0)


@pytest.mark.gpu
def test_dropout_on_gpu():
    """With values that name their keys the output is the mask itself; the gradient agrees."""
    skip_without_library("cudnn")
    samples = samples_from([[(40, 17), (24, 0)], [(64, 64)]]).cuda()
    mixed, grad = (x.to("cuda", torch.bfloat16) for x in random_inputs(samples, 2, 64))
    mixed[..., 128:] = torch.eye(64, device="cuda")[:, None, None]
    dropout = draw_dropout(0.3, torch.device("cuda"))
    out, actual = run("cudnn", mixed, grad, samples, dropout)
    again, _ = run("cudnn", mixed, grad, samples, dropout)
    assert torch.equal(out, again)
    exact = mixed.double().requires_grad_()
    q, k, v = (x.permute(1, 2, 0, 3) for x in exact.split(64, dim=-1))
    full, _ = run("reference", mixed.double(), grad.double(), samples)
    visible = full.view(64, 2, 2, 64).permute(1, 2, 0, 3) > 0
    keep = (out.view(64, 2, 2, 64).permute(1, 2, 0, 3) > 0).double()
    share = keep[visible].mean().item()
    assert abs(share - 0.7) < 0.03
    scores = (q @ k.transpose(2, 3) / 8).masked_fill(~visible, float("-inf"))
    dense = (scores.softmax(-1) * keep / 0.7 @ v).permute(2, 0, 1, 3).flatten(2)
    dense.backward(grad.double())
    for a, b in ((out, dense.detach()), (actual, exact.grad)):
        assert (a.double() - b).abs().max() <= 6 * 2**-9 * b.abs().max()
