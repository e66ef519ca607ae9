"""Peak memory of attention: `python -m tests.model.attention.peak_memory BACKEND DROPOUT LENGTH...`.

Runs in its own process, since a peak is of the whole process, and prints for each length, given
in growing order, by how many bytes the peak rose above that of BASE_LENGTH tokens.
"""

import resource
import sys

import torch

from megatron_glm.model.attention.backends import select_backend
from megatron_glm.model.attention.dropout import draw_dropout
from tests.model.attention.packs import samples_from

HEADS, DIM = 2, 64
BASE_LENGTH = 512


def peak() -> int:
    """Largest resident set of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forward_and_backward(backend: str, probability: float, seq_length: int) -> None:
    half = seq_length // 2
    samples = samples_from([[(half, half // 2), (half - 64, 100), (64, 0)]])
    mixed = torch.randn(seq_length, 1, HEADS, 3 * DIM, requires_grad=True)
    query, key, value = mixed.split(DIM, dim=-1)
    out = select_backend(backend, query, probability)(
        query, key, value, samples, softmax_scale=DIM**-0.5,
        dropout=draw_dropout(probability, mixed.device),
    )
    out.sum().backward()


def main() -> None:
    backend, probability, *lengths = sys.argv[1:]
    forward_and_backward(backend, float(probability), BASE_LENGTH)
    base = peak()
    growth = []
    for length in lengths:
        forward_and_backward(backend, float(probability), int(length))
        growth.append(peak() - base)
    print(*growth)


if __name__ == "__main__":
    main()
