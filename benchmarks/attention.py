"""Times every attention backend against causal attention: `python -m benchmarks.attention`.

For each shape, share of context and packing: forward and backward of each backend, in
milliseconds and in TFLOP/s of the work that the mask leaves, beside torch's causal attention
(cuDNN's on a GPU) over the whole sequence. Prints the table and writes a record; --plot draws it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.records import add_run_flags, reason, run_benchmark
from megatron_glm.model.attention.backends import BACKENDS, backends_of, load_backend
from megatron_glm.model.attention.bounds import make_samples, sample_ranges
from megatron_glm.model.dropout import draw_dropout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {
    "cuda": ["4x32x2048x128", "2x24x8192x128"],
    "cpu": ["4x8x512x64", "1x8x2048x64"],
}
CAUSAL = "causal"


def uniform_samples(batch: int, seq_length: int, packing: int, share: float) -> Tensor:
    """`packing` samples of equal length in each sequence, `share` of each its context."""
    ends = torch.arange(1, packing + 1) * seq_length // packing
    lengths = ends.diff(prepend=ends.new_zeros(1))
    contexts = (lengths * share).long()
    return make_samples(contexts.expand(batch, -1), ends.expand(batch, -1))


def visible_pairs(samples: Tensor) -> int:
    """(query, key) pairs that the mask leaves, over the batch."""
    pairs = 0
    for sequence in sample_ranges(samples):
        for start, context_end, end in sequence:
            context, later = context_end - start, end - context_end
            pairs += context * (context + later) + later * (later + 1) // 2
    return pairs


def forward_backward_flops(pairs: int, heads: int, dim: int) -> int:
    """Operations of attention: two products forward and five backward, 2 d each, for a pair."""
    return pairs * heads * 7 * 2 * dim


def causal_attention(query, key, value, samples, *, softmax_scale, dropout=None) -> Tensor:
    """Causal attention over the whole sequence by torch's best kernel: the yardstick."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    rate = dropout.probability if dropout is not None else 0.0
    on_gpu = query.device.type == "cuda" and query.dtype != torch.float32
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=rate, is_causal=True, scale=softmax_scale
        )
    return out.permute(2, 0, 1, 3).flatten(2)


def timed(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    """Milliseconds of `step` after two warm-up calls (compilation, autotuning).

    The median on a GPU; the least on a CPU, where other processes only ever add time.
    """
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times) if device.type == "cuda" else min(times)


def measure(
    backend: str, shape: tuple[int, ...], samples: Tensor, dtype: torch.dtype, rate: float,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of forward and of both passes, and on a GPU the peak beyond the inputs."""
    batch, heads, seq_length, dim = shape
    device = samples.device
    attend = causal_attention if backend == CAUSAL else load_backend(backend)
    mixed = torch.randn(
        seq_length, batch, heads, 3 * dim, device=device, dtype=dtype, requires_grad=True
    )
    grad = torch.randn(seq_length, batch, heads * dim, device=device, dtype=dtype)
    dropout = draw_dropout(rate, device)

    def forward():
        return attend(
            *mixed.split(dim, dim=-1), samples, softmax_scale=dim**-0.5, dropout=dropout
        )

    def both():
        mixed.grad = None
        forward().backward(grad)

    result = {"forward_ms": timed(forward, device, repeats), "ms": timed(both, device, repeats)}
    if device.type == "cuda":
        mixed.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each shape, packing, share and backend, causal attention first."""
    device = torch.device(arguments.device)
    for text in arguments.shapes:
        shape = tuple(int(size) for size in text.split("x"))
        batch, heads, seq_length, dim = shape
        causal = uniform_samples(batch, seq_length, 1, 0.0)
        cases = [(CAUSAL, 1, 0.0, causal)]
        for packing in arguments.packing:
            for share in arguments.share:
                samples = uniform_samples(batch, seq_length, packing, share)
                cases += [(name, packing, share, samples) for name in arguments.backends]
        yardstick = None
        for name, packing, share, samples in cases:
            row = {"shape": text, "packing": packing, "share": share, "backend": name}
            try:
                times = measure(
                    name, shape, samples.to(device), DTYPES[arguments.dtype], arguments.dropout,
                    arguments.repeats,
                )
            except (NotImplementedError, RuntimeError, ValueError) as error:
                yield row | {"error": reason(error)}
                continue
            flops = forward_backward_flops(visible_pairs(samples), heads, dim)
            speed = flops / times["ms"] / 1e9
            yardstick = yardstick or speed
            yield row | times | {"tflops": speed, "of_causal": speed / yardstick}


def plot(rows: list[dict], path: Path) -> None:
    """Bars of TFLOP/s of each backend, one group for each shape, packing and share."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = sorted({(r["shape"], r["packing"], r["share"]) for r in rows if r["backend"] != CAUSAL})
    names = sorted({r["backend"] for r in rows})
    figure, axes = plt.subplots(figsize=(2 + 1.2 * len(cases), 5), layout="constrained")
    for index, name in enumerate(names):
        speeds = [
            next(
                (
                    r["tflops"] for r in rows
                    if r["backend"] == name and r["shape"] == shape
                    and (name == CAUSAL or (r["packing"], r["share"]) == (packing, share))
                ),
                0.0,
            )
            for shape, packing, share in cases
        ]
        width = 0.8 / len(names)
        axes.bar([c + index * width for c in range(len(cases))], speeds, width, label=name)
    labels = [f"{shape}\n{packing} samples\ncontext {share}" for shape, packing, share in cases]
    axes.set_xticks([c + 0.4 for c in range(len(cases))], labels, fontsize=7)
    axes.set_ylabel("TFLOP/s of the mask's work, forward and backward")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; shapes, backends and dtype default to what suits the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS)
    parser.add_argument("--shapes", nargs="+",
                        help="batch x heads x sequence x head dimension, as 4x32x2048x128")
    parser.add_argument("--share", nargs="+", type=float, default=[0.0, 0.5, 1.0],
                        help="share of each sample that is its context")
    parser.add_argument("--packing", nargs="+", type=int, default=[1, 4],
                        help="samples of a sequence")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=10)
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    kind = torch.device(arguments.device).type
    arguments.backends = arguments.backends or backends_of(kind)
    arguments.shapes = arguments.shapes or SHAPES[kind]
    arguments.dtype = arguments.dtype or ("bf16" if kind == "cuda" else "fp32")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the record and, if asked, the plot."""
    arguments = parse(argv)
    run_benchmark("attention", arguments, run(arguments), plot=plot)


if __name__ == "__main__":
    main()
