"""Times prefill and decode by the form of the weights: `python -m benchmarks.decode`.

For each form (fp16, bf16, INT8, INT4) and batch: milliseconds of reading the contexts and of one
step, tokens a second, TFLOP/s of the layers' products while reading, the speed of a step against
bf16's, and what a step reads (weights and cache) as a share of the memory bandwidth that a copy
reaches; where steps are replayed as CUDA graphs, also milliseconds of one that is not. INT8 and
INT4 compute in bf16, with -fp16 in fp16. Weights are random; forms take turns, so that whatever
else the machine does falls on all of them. A form that does not fit has the reason in its row.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from benchmarks.records import add_run_flags, reason, run_benchmark
from benchmarks.timing import copy_gb_per_s
from megatron_glm.checkpoint.quantization import QuantizedWeight, largest_code
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.checkpoint.table import Dimensions, Tensor
from megatron_glm.inference.engine import Engine
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.weights import Weights

# Type of the arithmetic, and bits of quantised weights.
FORMS = {
    "fp32": (torch.float32, None),
    "fp16": (torch.float16, None),
    "bf16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, 8),
    "int4": (torch.bfloat16, 4),
    "int8-fp16": (torch.float16, 8),
    "int4-fp16": (torch.float16, 4),
}
YARDSTICK = "bf16"
# Steps of a round that are not replayed.
EAGER_STEPS = 8
SHAPES = {
    "cpu": {"num_layers": 4, "context": 64, "batches": [1, 8], "steps": 5},
    "cuda": {"num_layers": 12, "context": 1024, "batches": [1, 8, 32], "steps": 50},
}


class RandomSource:
    """A checkpoint of random weights, codes where `bits` says so, made as it is read."""

    directory = Path("random")

    def __init__(self, dimensions: Dimensions, bits: int | None, seq_length: int):
        self.settings = Settings(dimensions, "fp32", True, seq_length)
        self.dtype, self.bits = torch.float16, bits
        # Its length is odd, so that no two rows of a weight are the same.
        self._noise = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0))

    def read(self, tensor: Tensor) -> torch.Tensor | QuantizedWeight:
        shape = tensor.shape(self.settings.dimensions)
        count = torch.Size(shape).numel()
        if self.bits and tensor.row.quantizable:
            largest = largest_code(self.bits)
            codes = (self._noise * largest / 3).round().clamp(-largest, largest).to(torch.int8)
            scales = torch.full((shape[0], 1), 0.06 / largest, dtype=torch.float16)
            return QuantizedWeight(_tiled(codes, count).view(shape), scales, self.bits)
        return _tiled((self._noise * 0.02).half(), count).view(shape)


def _tiled(values: torch.Tensor, count: int) -> torch.Tensor:
    return values.repeat(-(-count // len(values)))[:count]


def make_engine(arguments: argparse.Namespace, form: str) -> Engine:
    dtype, bits = FORMS[form]
    dimensions = Dimensions(
        arguments.num_layers, arguments.hidden_size, arguments.ffn_hidden_size,
        arguments.num_attention_heads, arguments.vocab_size,
    )
    source = RandomSource(dimensions, bits, arguments.context + arguments.steps + EAGER_STEPS)
    weights = Weights(source, Layout(), torch.device(arguments.device), dtype)
    return Engine(source.settings, weights, Layout())


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def bytes_of_a_step(engine: Engine, batch: int, length: int) -> int:
    """What a step has to read: every weight, and keys and values of `length` tokens a row."""
    cache = 2 * batch * length * engine.num_heads * engine.head_dim * engine.dtype.itemsize
    return engine.num_weight_bytes + len(engine.layers) * cache


class Measurement:
    """Least seconds of prefill and step of one form and batch."""

    def __init__(self, engine: Engine, batch: int, context: int, steps: int):
        self.engine, self.batch, self.steps = engine, batch, steps
        vocab_size = engine.settings.dimensions.vocab_size
        self._contexts = torch.randint(vocab_size, (batch, context)).tolist()
        self.prefill_s = self.step_s = self.eager_step_s = float("inf")

    def take(self, has_prefill: bool) -> None:
        """Measures once more."""
        engine, batch = self.engine, self.batch
        length = len(self._contexts[0])
        engine.cache = engine.new_cache()
        if has_prefill:
            seconds = timed(lambda: engine.prefill(self._contexts), engine.device)
            self.prefill_s = min(self.prefill_s, seconds)
        else:
            # Zeros: a step takes the same time whatever the cache holds.
            engine.cache.add_rows([length] * batch)
        self.step_s = min(self.step_s, *self._seconds_of_steps(range(self.steps)))
        if self._is_replayed:
            steps = range(self.steps, self.steps + EAGER_STEPS)
            engine.graphs.enabled = False
            try:
                self.eager_step_s = min(self.eager_step_s, *self._seconds_of_steps(steps))
            finally:
                engine.graphs.enabled = True

    @property
    def _is_replayed(self) -> bool:
        return self.engine.graphs is not None and self.engine.graphs.enabled

    def _seconds_of_steps(self, steps: range) -> Iterator[float]:
        for step in steps:
            positions = [len(self._contexts[0]) + step] * self.batch
            decode = partial(self.engine.decode, [1] * self.batch, positions)
            yield timed(decode, self.engine.device)

    def row(self, form: str, bandwidth: float, yardstick: "Measurement | None") -> dict:
        length = len(self._contexts[0])
        num_bytes = bytes_of_a_step(self.engine, self.batch, length)
        dimensions = self.engine.settings.dimensions
        h, f = dimensions.hidden_size, dimensions.ffn_hidden_size
        flops = 2 * dimensions.num_layers * (4 * h * h + 3 * h * f) * self.batch * length
        row = {
            "form": form,
            "batch": self.batch,
            "weights_gib": self.engine.num_weight_bytes / 2**30,
            "prefill_ms": self.prefill_s * 1e3,
            "prefill_tokens_per_s": self.batch * length / self.prefill_s,
            "prefill_tflops": flops / self.prefill_s / 1e12,
            "step_ms": self.step_s * 1e3,
            "tokens_per_s": self.batch / self.step_s,
            "read_gb_per_s": num_bytes / self.step_s / 1e9,
            "of_copy_bandwidth": num_bytes / self.step_s / bandwidth,
        }
        if self._is_replayed:
            row["eager_step_ms"] = self.eager_step_s * 1e3
        if yardstick is not None:
            row["speed_of_bf16"] = yardstick.step_s / self.step_s
        return row


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    """One row for each batch and form."""
    bandwidth = 1e9 * copy_gb_per_s(torch.device(arguments.device), repeats=7)
    engines: dict[str, Engine] = {}
    errors: dict[str, str] = {}
    for form in arguments.forms:
        with noting_failure(errors, form):
            engines[form] = make_engine(arguments, form)
    for batch in arguments.batches:
        measured = {
            form: Measurement(engine, batch, arguments.context, arguments.steps)
            for form, engine in engines.items()
        }
        failed = dict(errors)
        for number in range(arguments.rounds):
            for form, measurement in measured.items():
                if form not in failed:
                    with noting_failure(failed, form):
                        measurement.take(has_prefill=number < arguments.prefill_rounds)
        yardstick = None if YARDSTICK in failed else measured.get(YARDSTICK)
        for form in arguments.forms:
            if form in failed:
                yield {"form": form, "batch": batch, "error": failed[form]}
            else:
                yield measured[form].row(form, bandwidth, yardstick)


@contextmanager
def noting_failure(errors: dict[str, str], form: str) -> Iterator[None]:
    """Notes why a form fails, and goes on."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        errors[form] = reason(error)


def plot(rows: list[dict], path: Path) -> None:
    """Bars of tokens a second of decode by form, one group a batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in rows})
    forms = list(dict.fromkeys(row["form"] for row in rows))
    figure, axes = plt.subplots(figsize=(2 + 1.5 * len(batches), 4), layout="constrained")
    width = 0.8 / len(forms)
    for index, form in enumerate(forms):
        of_batch = {row["batch"]: row["tokens_per_s"] for row in rows if row["form"] == form}
        speeds = [of_batch.get(batch, 0.0) for batch in batches]
        axes.bar([at + index * width for at in range(len(batches))], speeds, width, label=form)
    axes.set_xticks([at + 0.4 for at in range(len(batches))], [f"batch {b}" for b in batches])
    axes.set_yscale("log")
    axes.set_ylabel("tokens a second")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; layers, context, batches and steps default to what suits the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--forms", nargs="+", choices=FORMS)
    add("--num-layers", type=int)
    add("--hidden-size", type=int, default=4096)
    add("--ffn-hidden-size", type=int, default=10880)
    add("--num-attention-heads", type=int, default=32)
    add("--vocab-size", type=int, default=50304)
    add("--context", type=int, help="tokens of each context")
    add("--batches", type=int, nargs="+")
    add("--steps", type=int, help="steps of a round")
    add("--rounds", type=int, default=3, help="turns of each form; the least time of all counts")
    add("--prefill-rounds", type=int, default=2, help="turns in which contexts are read")
    add_run_flags(parser)
    arguments = parser.parse_args(argv)
    kind = torch.device(arguments.device).type
    for name, value in SHAPES[kind].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    others = ["bf16", "int8", "int4"]
    arguments.forms = arguments.forms or (others if kind == "cpu" else ["fp16", *others])
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the record and, if asked, the plot."""
    arguments = parse(argv)
    run_benchmark("decode", arguments, run(arguments), plot=plot)


if __name__ == "__main__":
    main()
