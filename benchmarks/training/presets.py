"""What `train_step.py` measures: models, and presets of their sizes and of who takes turns."""

from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.training.work import Size


class Model(NamedTuple):
    """A process: its program, what its steps can be (a row each), the type of its weights."""

    program: str
    variants: tuple[str, ...]
    dtype: str = "bf16"
    options: dict[str, Any] = {}  # noqa: RUF012
    flags: tuple[str, ...] = ()


RATES = "rates"
MODELS = {
    RATES: Model("benchmarks.training.rates", ("products", "attention", "copy")),
    "glm": Model("benchmarks.training.glm", ("glm", "causal")),
    "glm-fp16": Model("benchmarks.training.glm", ("glm-fp16",), "fp16"),
    "glm-lean": Model(
        "benchmarks.training.glm", ("glm-lean",),
        flags=("--use-distributed-optimizer", "--use-precision-aware-optimizer",
               "--glm-recompute-norms-and-geglu"),
    ),
    "glm-te": Model(
        "benchmarks.training.glm", ("glm-te",), flags=("--transformer-impl", "transformer_engine")
    ),
    "llama": Model("benchmarks.training.llama", ("llama",)),
    "llama-causal": Model(
        "benchmarks.training.llama", ("llama-causal",), options={"without_mask": True}
    ),
    "stock": Model("benchmarks.training.stock", ("stock",)),
}  # fmt: skip


class Preset(NamedTuple):
    """Sizes, and groups of models that fit into one H200 together and take turns."""

    sizes: tuple[Size, ...]
    groups: tuple[tuple[str, ...], ...]
    dropout: float = 0.0
    """Unless --dropout says otherwise."""


H4096 = Size(12, 4096, 32, 10880, 50304, 2048, micro_batch_size=4, num_micro_batches=8)
H12288 = Size(2, 12288, 96, 32768, 50304, 2048, micro_batch_size=1, num_micro_batches=8)
TINY = Size(2, 64, 4, 160, 512, 128, micro_batch_size=2, num_micro_batches=2)
ALL = (("rates", "glm", "llama"), ("stock",))
PRESETS = {
    "tiny": Preset((TINY,), (*ALL, ("llama-causal",))),
    "4096": Preset((H4096,), (*ALL, ("llama-causal",))),
    "12288": Preset((H12288,), ALL),
    # With the dropout that Megatron trains with unless it is told otherwise.
    "memory": Preset((H4096,), (("glm",), ("glm-lean",), ("stock",)), dropout=0.1),
    "fp16": Preset((H4096,), (("glm", "glm-fp16"),)),
    # Transformer Engine's linears beside Megatron's; its optimizer is taken by both.
    "linears": Preset((H4096, H12288), (("rates", "glm", "glm-te"),)),
    # As many tokens a step in each.
    "scaling": Preset(
        (
            replace(H4096, num_layers=4), H4096, replace(H4096, num_layers=24),
            replace(H4096, seq_length=8192, micro_batch_size=1),
            replace(H4096, seq_length=32768, micro_batch_size=1, num_micro_batches=2),
        ),
        (("rates", "glm"),),
    ),
}  # fmt: skip
