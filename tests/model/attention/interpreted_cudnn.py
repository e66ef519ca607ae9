"""The parts that cuDNN is given and what is made of them, with cuDNN's calls emulated in fp64.

test_cudnn.py runs this file in a process of its own, under Triton's interpreter. The emulation
computes each row by itself and writes nothing else, so that what is left unwritten stays NaN.
"""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from megatron_glm.model.attention import cudnn_graphs, half_precision
from megatron_glm.model.attention.bounds import dense_mask, sample_ranges
from megatron_glm.model.dropout import Dropout
from tests.model.attention.packs import PACKS, packs, random_inputs, run, samples_from

RATE = 0.3
# The tensors of a graph with the offsets that they begin at.
OF_QUERIES = {"query": "query_offset", "out": "out_offset", "grad": "out_offset",
              "dq": "out_offset", "lse": "lse_offset"}  # fmt: skip
OF_KEYS = {"key": "key_offset", "value": "value_offset", "dk": "dk_offset", "dv": "dk_offset"}
SEED = torch.tensor([20221005, -7], dtype=torch.int32)


@pytest.fixture(autouse=True, scope="module")
def emulated():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cudnn_graphs, "run", run_emulated)
        patch.setattr(half_precision, "DTYPES", (torch.float64,))
        torch.use_deterministic_algorithms(True)  # torch.empty is NaN
        yield
        torch.use_deterministic_algorithms(False)


def kept(seed: int, row: int, heads: int, queries: int, keys: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed % 2**63 + row)
    return torch.rand(heads, queries, keys, generator=generator) >= RATE


def row_of(tensors, name, offset, row, length):
    x = tensors[name]
    strides = (x.stride(0), *x.stride()[2:])
    place = x.storage_offset() + int(tensors[offset][row])
    return x.as_strided((length, *x.shape[2:]), strides, place)


def run_emulated(form, tensors):
    for row in range(form.rows):
        queries, keys = (int(tensors[f"{of}_length"][row]) for of in ("query", "key"))
        assert (queries == 0) == (keys == 0)
        if queries == 0:
            continue
        parts = {
            name: row_of(tensors, name, offset, row, keys if name in OF_KEYS else queries)
            for name, offset in (OF_QUERIES | OF_KEYS).items()
            if name in tensors
        }
        q, k, v = (parts[name].transpose(0, 1) for name in ("query", "key", "value"))
        scores = q @ k.transpose(1, 2) * form.softmax_scale
        if form.alignment is not None:
            shift = keys - queries if form.alignment == "BOTTOM_RIGHT" else 0
            above = torch.ones(queries, keys, dtype=torch.bool).triu(1 + shift)
            scores = scores.masked_fill(above, float("-inf"))
        factor = 1.0
        if form.rate:
            # It does not join dropout to a mask from the end.
            assert form.alignment != "BOTTOM_RIGHT"
            factor = kept(int(tensors["seed"]), row, *scores.shape) / (1 - form.rate)
        if form.is_forward:
            lse = scores.logsumexp(-1)
            parts["lse"].copy_(lse.t())
            probability = (scores - lse[..., None]).exp()
            parts["out"].copy_((probability * factor @ v).transpose(0, 1))
            continue
        grad, out = (parts[name].transpose(0, 1) for name in ("grad", "out"))
        probability = (scores - parts["lse"].t()[..., None].double()).exp()
        parts["dv"].copy_(((probability * factor).transpose(1, 2) @ grad).transpose(0, 1))
        delta = (grad * out).sum(-1, keepdim=True)
        slope = probability * (factor * (grad @ v.transpose(1, 2)) - delta) * form.softmax_scale
        parts["dq"].copy_((slope @ k).transpose(0, 1))
        parts["dk"].copy_((slope.transpose(1, 2) @ q).transpose(0, 1))


def dropped_exactly(mixed, grad, samples):
    """Output and gradient of dense attention with the mask that the two parts drew."""
    mixed = mixed.detach().clone().requires_grad_()
    seq_length, batch, heads, dims = mixed.shape
    dim = dims // 3
    q, k, v = (x.permute(1, 2, 0, 3) for x in mixed.split(dim, dim=-1))
    keep = torch.ones(batch, heads, seq_length, seq_length)
    first, second = SEED.tolist()
    places = samples.shape[-1]
    for index, sequence in enumerate(sample_ranges(samples)):
        for start, context_end, end in sequence:
            row = index * places + samples[index, 1].tolist().index(end)
            for seed, rows, columns in (
                ((first << 32) + second, slice(start, end), slice(start, context_end)),
                ((second << 32) + first, slice(context_end, end), slice(context_end, end)),
            ):
                shape = rows.stop - rows.start, columns.stop - columns.start
                if all(shape):
                    keep[index, :, rows, columns] = kept(seed, row, heads, *shape).float()
    scores = q @ k.transpose(2, 3) * dim**-0.5
    visible = dense_mask(samples, seq_length)[:, None]
    probability = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = (probability * keep / (1 - RATE) @ v).permute(2, 0, 1, 3).flatten(2)
    out.backward(grad)
    return out.detach(), mixed.grad


def assert_exact(batch, num_rows=None, heads=2, dim=8):
    samples = samples_from(batch, num_rows)
    mixed, grad = random_inputs(samples, heads, dim)
    dropout = Dropout(RATE, SEED)
    for actual, expected in (
        (run("cudnn", mixed, grad, samples), run("reference", mixed, grad, samples)),
        (run("cudnn", mixed, grad, samples, dropout), dropped_exactly(mixed, grad, samples)),
    ):
        for a, b in zip(actual, expected, strict=True):
            # The log-sum-exp is kept in fp32.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", PACKS.values(), ids=PACKS)
def test_packs(batch):
    assert_exact(batch, heads=1)


def test_unused_places():
    assert_exact([[(9, 4), (7, 0), (1, 1)], [(17, 17)]], num_rows=6, heads=3, dim=24)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(pack=packs(max_batch=2, max_length=24))
def test_any_pack(pack):
    assert_exact(pack[1], heads=1)
