"""Packs of samples and random attention inputs for the tests of attention."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from megatron_glm.model.attention.backends import load_backend
from megatron_glm.model.attention.bounds import make_samples


def samples_from(batch: list[list[tuple[int, int]]], num_rows: int | None = None) -> Tensor:
    """int32 [b, 2, k] from (length, context length) of the samples of each sequence."""
    num_rows = num_rows or max(map(len, batch))
    contexts, ends = [], []
    for pack in batch:
        lengths, pack_contexts = zip(*pack, strict=True)
        pack_ends = torch.tensor(lengths).cumsum(0).tolist()
        unused = num_rows - len(pack)
        contexts.append([*pack_contexts, *[0] * unused])
        ends.append(pack_ends + [pack_ends[-1]] * unused)
    return make_samples(torch.tensor(contexts), torch.tensor(ends))


@st.composite
def packs(draw, max_batch: int = 3, max_length: int = 70):
    """(s, batch as for `samples_from`): unequal samples, of one token too, with every context
    from none to the whole sample."""
    seq_length = draw(st.integers(1, max_length))
    batch = []
    for _ in range(draw(st.integers(1, max_batch))):
        pack, left = [], seq_length
        while left:
            length = draw(st.integers(1, left))
            context = draw(st.one_of(st.just(0), st.just(length), st.integers(0, length)))
            pack.append((length, context))
            left -= length
        batch.append(pack)
    return seq_length, batch


# Sequences over several blocks of every kernel, with one sample, none of them aligned, four
# equal ones as the paper packs, whole-context and one-token samples, and padding at the end.
MOST_UNEQUAL = "unequal, two sequences"
PACKS = {
    "one sample": [[(300, 150)]],
    "causal": [[(300, 0)]],
    "bidirectional": [[(300, 300)]],
    "four equal": [[(128, 100), (128, 10), (128, 64), (128, 128)]],
    MOST_UNEQUAL: [
        [(137, 70), (1, 0), (1, 1), (129, 128), (32, 0)],
        [(20, 0), (250, 201), (30, 0)],
    ],
}


def random_inputs(samples: Tensor, heads: int, dim: int, dtype=torch.float64, seed: int = 0):
    """query, key, value [s, b, n, d] as strided slices of one projection, and a gradient of the
    output."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq_length = samples.shape[0], int(samples[0, 1, -1])
    mixed = torch.randn(seq_length, batch, heads, 3 * dim, generator=generator, dtype=dtype)
    grad = torch.randn(seq_length, batch, heads * dim, generator=generator, dtype=dtype)
    return mixed, grad


def run(backend: str, mixed: Tensor, grad: Tensor, samples: Tensor, dropout=None):
    """(output, gradient of `mixed`) of a backend at the scale 1 / sqrt(d)."""
    mixed = mixed.detach().clone().requires_grad_()
    dim = mixed.shape[-1] // 3
    out = load_backend(backend)(
        *mixed.split(dim, dim=-1), samples, softmax_scale=dim**-0.5, dropout=dropout
    )
    out.backward(grad)
    return out.detach(), mixed.grad
