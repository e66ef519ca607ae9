"""Peak memory of attention: `python -m tests.model.attention.peak_memory auto 0.1 2048 4096`.

Runs a backend, at a rate of dropout, in its own process, since a peak is of a process. Prints for
each length, given in growing order, by how many bytes the peak rose above BASE_LENGTH tokens'.
"""

import re
import sys
from pathlib import Path

import torch

from megatron_glm.model.attention.backends import select_backend
from megatron_glm.model.dropout import draw_dropout
from tests.model.attention.packs import samples_from

HEADS, DIM = 2, 64
BASE_LENGTH = 512


def peak() -> int:
    """Largest resident set of this process so far, bytes; Linux keeps it."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024


def forward_and_backward(backend: str, probability: float, seq_length: int) -> None:
    half = seq_length // 2
    samples = samples_from([[(half, half // 2), (half - 64, 100), (64, 0)]])
    mixed = torch.randn(seq_length, 1, HEADS, 3 * DIM, requires_grad=True)
    query, key, value = mixed.split(DIM, dim=-1)
    out = select_backend(backend, "cpu")(
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
