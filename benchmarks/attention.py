"""Times every attention backend against causal attention: `python -m benchmarks.attention`.

For each shape, dropout, share of context and packing: forward and backward of each backend, in
milliseconds and in TFLOP/s of the work that the mask leaves, beside torch's causal attention
(cuDNN's on a GPU) over the whole sequence without dropout. `ns_per_token` compares samples of 512
that share a sequence of 2048 with samples by themselves; "compiled" counts the graphs and kernels
that were compiled for the row. The dense reference stops at sequences of 4096.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters as dynamo_counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton import knobs

from benchmarks.records import Check, add_run_flags, reason, run_benchmark
from benchmarks.timing import timed
from megatron_glm.model.attention.backends import (
    BACKENDS,
    NO_DROPOUT,
    backends_of,
    load_backend,
)
from megatron_glm.model.attention.bounds import make_samples, sample_ranges
from megatron_glm.model.dropout import draw_dropout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {
    "cuda": ["4x32x2048x128", "2x24x8192x128", "16x32x512x128", "1x32x32768x128"],
    "cpu": ["4x8x512x64", "1x8x2048x64"],
}
CAUSAL = "causal"
LONGEST_DENSE = 4096
# Of figure 4: the shapes and the share of context at which auto must keep up with causal attention.
REQUIRED_SHAPES, REQUIRED_SHARE, REQUIRED_OF_CAUSAL = SHAPES["cuda"][:2], 0.5, 0.95


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


def measure(
    backend: str, shape: tuple[int, ...], samples: Tensor, dtype: torch.dtype, rate: float,
    repeats: int,
) -> dict[str, float]:
    """Milliseconds of forward and of both passes, and on a GPU the peak beyond the inputs."""
    batch, heads, seq_length, dim = shape
    device = samples.device
    attend = causal_attention if backend == CAUSAL else load_backend(backend)
    mixed = torch.randn(seq_length, batch, heads, 3 * dim, device=device, dtype=dtype)
    # As slices of a projection, whose gradients are not put together: that is none of attention's.
    inputs = [x.requires_grad_() for x in mixed.split(dim, dim=-1)]
    grad = torch.randn(seq_length, batch, heads * dim, device=device, dtype=dtype)
    dropout = draw_dropout(rate, device)

    def forward():
        return attend(*inputs, samples, softmax_scale=dim**-0.5, dropout=dropout)

    def both():
        torch.autograd.grad(forward(), inputs, grad)

    result = {"forward_ms": timed(forward, device, repeats), "ms": timed(both, device, repeats)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        result["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


class Compilations:
    """Counts what torch.compile and Triton compile while this is entered."""

    def __enter__(self) -> "Compilations":
        self._graphs = dynamo_counters["stats"]["unique_graphs"]
        self._kernels = 0
        self._listener, knobs.compilation.listener = knobs.compilation.listener, self._heard
        return self

    def __exit__(self, *_: object) -> None:
        knobs.compilation.listener = self._listener
        self.count = dynamo_counters["stats"]["unique_graphs"] - self._graphs + self._kernels

    def _heard(self, **_: object) -> None:
        self._kernels += 1


def cases(arguments: argparse.Namespace, shape: tuple[int, ...]) -> Iterator[tuple]:
    """Backend, packing, share, dropout and samples of each row of a shape, causal first."""
    batch, _, seq_length, _ = shape
    names = [n for n in arguments.backends if n != "reference" or seq_length <= LONGEST_DENSE]
    for dropout in arguments.dropout:
        yield CAUSAL, 1, 0.0, dropout, uniform_samples(batch, seq_length, 1, 0.0)
        able = [name for name in names if dropout == 0 or name not in NO_DROPOUT]
        for packing in arguments.packing:
            for share in arguments.share:
                samples = uniform_samples(batch, seq_length, packing, share)
                for name in able:
                    yield name, packing, share, dropout, samples


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each shape, dropout, packing, share and backend."""
    device = torch.device(arguments.device)
    for text in arguments.shapes:
        shape = tuple(int(size) for size in text.split("x"))
        batch, heads, seq_length, dim = shape
        yardstick = None
        # Kernels of all shapes are more than torch keeps.
        torch.compiler.reset()
        for name, packing, share, dropout, samples in cases(arguments, shape):
            row = {"shape": text, "dropout": dropout, "packing": packing, "share": share,
                   "backend": name}
            try:
                with Compilations() as compilations:
                    times = measure(
                        name, shape, samples.to(device), DTYPES[arguments.dtype], dropout,
                        arguments.repeats,
                    )
            # Whatever stops a kernel, the others may run.
            except Exception as error:
                yield row | {"error": reason(error)}
                continue
            flops = forward_backward_flops(visible_pairs(samples), heads, dim)
            speed = flops / times["ms"] / 1e9
            if name == CAUSAL and dropout == 0:
                yardstick = speed
            yield row | times | {
                "ns_per_token": times["ms"] * 1e6 / (batch * seq_length),
                "tflops": speed,
                "of_causal": speed / yardstick if yardstick else None,
                "compiled": compilations.count,
            }


def judge(rows: list[dict]) -> list[Check]:
    """Figure 4, and that nothing but shape, dropout and backend is compiled for."""
    by_case = {
        (r["shape"], r["backend"]): r["of_causal"] for r in rows
        if "error" not in r and r["of_causal"] is not None
        and (r["dropout"], r["packing"], r["share"]) == (0.0, 1, REQUIRED_SHARE)
    }
    seen, again = set(), 0
    for row in rows:
        case = row["shape"], row["dropout"], row["backend"]
        again += row.get("compiled", 0) if case in seen else 0
        seen.add(case)
    # Auto is the fastest at the shape of a run.
    best = {
        shape: max(((share, backend) for (of, backend), share in by_case.items() if of == shape),
                   default=(None, "none"))
        for shape in REQUIRED_SHAPES if any(row["shape"] == shape for row in rows)
    }  # fmt: skip
    return [
        *(
            Check(f"{shape}, auto ({backend}) of causal attention's TFLOP/s (figure 4)", share,
                  REQUIRED_OF_CAUSAL)
            for shape, (share, backend) in best.items()
        ),
        Check("compilations for another packing or context", again, 0, is_floor=False),
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Bars of TFLOP/s of each backend by packing and share, a panel for each shape and dropout."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes, dropouts, cases, names = (
        list(dict.fromkeys(of(row) for row in rows))
        for of in (lambda r: r["shape"], lambda r: r["dropout"], _case, lambda r: r["backend"])
    )
    figure, panels = plt.subplots(
        len(shapes), len(dropouts), figsize=(7 * len(dropouts), 3 * len(shapes)),
        layout="constrained", squeeze=False, sharex=True,
    )  # fmt: skip
    width = 0.8 / len(names)
    for shape, line in zip(shapes, panels, strict=True):
        for dropout, axes in zip(dropouts, line, strict=True):
            own = [row for row in rows if (row["shape"], row["dropout"]) == (shape, dropout)]
            for index, name in enumerate(names):
                of_name = {_case(row): row["tflops"] for row in own if row["backend"] == name}
                # Causal attention has no packing and no context: the same bar beside each.
                causal = of_name.get((1, 0.0), 0.0) if name == CAUSAL else 0.0
                speeds = [of_name.get(case, causal) for case in cases]
                axes.bar([c + index * width for c in range(len(cases))], speeds, width, label=name)
            axes.set_title(f"{shape}, dropout {dropout:g}", fontsize=9)
            axes.set_ylabel("TFLOP/s of the mask's work")
            labels = [f"{packing} samples\ncontext {share:g}" for packing, share in cases]
            axes.set_xticks([c + 0.4 for c in range(len(cases))], labels, fontsize=7)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right",
                  ncols=len(names))  # fmt: skip
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _case(row: dict) -> tuple:
    return row["packing"], row["share"]


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
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
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
    run_benchmark("attention", arguments, run(arguments), plot=plot, judge=judge)


if __name__ == "__main__":
    main()
