"""The backends of a GPU start their work without a word from it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_glm.model.attention import cudnn, cudnn_graphs, flex, half_precision, triton
from megatron_glm.model.dropout import draw_dropout
from tests.host_reads import HostReads
from tests.model.attention.packs import PACKS, random_inputs, samples_from

BACKENDS = {"flex": flex, "triton": triton, "cudnn": cudnn}


def no_kernel(query, key, value, *, return_aux=None, **options):
    out = query + key + value
    return out if return_aux is None else (out, SimpleNamespace(lse=out.sum(dim=-1)))


@pytest.mark.parametrize("probability", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", BACKENDS)
def test_neither_pass_reads_the_device(name, probability, monkeypatch):
    # A kernel reads nothing back; its form for a CPU does.
    monkeypatch.setattr(flex, "_kernel", lambda device: no_kernel)
    for launch in ("launch", "launch_output_dot_gradient"):
        monkeypatch.setattr(triton._Call, launch, lambda *arguments: None)
    monkeypatch.setattr(cudnn_graphs, "run", lambda *arguments: None)
    monkeypatch.setattr(cudnn, "merge", lambda *arguments: None)
    monkeypatch.setattr(half_precision, "DTYPES", (torch.float32,))
    samples = samples_from(PACKS["unequal, two sequences"])
    mixed, grad = random_inputs(samples, heads=2, dim=8, dtype=torch.float32)
    mixed.requires_grad_()
    with HostReads() as reads:
        dropout = draw_dropout(probability, mixed.device)
        inputs = mixed.split(8, dim=-1)
        out = BACKENDS[name].attention(*inputs, samples, softmax_scale=1.0, dropout=dropout)
        out.backward(grad)
    assert reads.sites == {}
