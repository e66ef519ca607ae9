"""Measures what quantised weights cost a trained model.

    python benchmarks/quantization.py --load run --data-path corpus_text_document

Real text runs through the model in fp32, half of each sequence as context. For every scheme the
linear weights of the layers are rounded, and a row says: the relative error |Wx - W'x| / |Wx| of
their outputs for the inputs that they really have (mean, and the worst of all weights), the same
of the logits, the loss on the second halves, and the size of these weights against fp16. "Row" has
a scale a row, as the released GLM-130B; a group has one for so many columns.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import patches  # noqa: E402

patches.apply()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks.records import print_table, write_record  # noqa: E402
from megatron_glm.checkpoint.convert import Source  # noqa: E402
from megatron_glm.checkpoint.formats import open_checkpoint  # noqa: E402
from megatron_glm.checkpoint.quantization import quantize  # noqa: E402
from megatron_glm.checkpoint.reference import forward  # noqa: E402
from megatron_glm.checkpoint.table import Format, tensors  # noqa: E402
from megatron_glm.data.indexed import token_dtype  # noqa: E402

GROUP_SIZES = (None, 128, 32)


class Model:
    """A checkpoint's weights in memory, and what they compute on some sequences."""

    def __init__(self, source: Source, tokens: torch.Tensor):
        self.settings = source.settings
        self.weights = {
            tensor.name(Format.MEGATRON): source.read(tensor).float()
            for tensor in tensors(source.settings.dimensions)
        }
        self.linears = [
            tensor.name(Format.MEGATRON)
            for tensor in tensors(source.settings.dimensions)
            if tensor.row.quantizable
        ]
        self.tokens, self.length = tokens, tokens.shape[1]
        self.inputs: dict[str, torch.Tensor] = {}
        self.logits = self.run(self.weights, self.inputs)

    def run(self, weights: dict, inputs: dict) -> torch.Tensor:
        """Logits; the inputs of the linear weights are put into `inputs`."""
        samples = torch.tensor([[[0, self.length // 2, self.length]]] * len(self.tokens))
        return forward(
            weights.__getitem__, self.settings.dimensions, self.tokens,
            torch.arange(self.length).expand_as(self.tokens), samples,
            self.settings.rotary_angle_dtype, inputs.__setitem__,
        )  # fmt: skip

    def loss(self, logits: torch.Tensor) -> float:
        """Mean loss of the second halves."""
        start = self.length // 2
        targets = self.tokens[:, start + 1 :]
        return F.cross_entropy(logits[:, start:-1].mT, targets).item()

    def row(self, label: str, bits: int, group_size: int | None) -> dict:
        """What a scheme costs."""
        rounded, errors, size = dict(self.weights), [], 0
        for name in self.linears:
            weight = self.weights[name]
            groups = weight.shape[1] // group_size if group_size else 1
            quantized = quantize(weight, bits, groups)
            rounded[name] = quantized.dequantize(torch.float32)
            size += weight.numel() * bits / 8 + quantized.scales.numel() * 2
            outputs = F.linear(self.inputs[name], weight)
            off = outputs - F.linear(self.inputs[name], rounded[name])
            errors.append((off.norm() / outputs.norm()).item())
        logits = self.run(rounded, {})
        whole = 2 * sum(self.weights[name].numel() for name in self.linears)
        return {
            "weights": label,
            "output_error": float(np.mean(errors)),
            "worst_output_error": max(errors),
            "logit_error": ((logits - self.logits).norm() / self.logits.norm()).item(),
            "loss": self.loss(logits),
            "size_of_fp16": size / whole,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", type=Path, required=True, help="checkpoint of any format")
    parser.add_argument("--data-path", required=True, help="prefix of a .bin and .idx")
    parser.add_argument("--sequences", type=int, default=16)
    args = parser.parse_args()
    source = open_checkpoint(args.load)
    fingerprint = source.settings.tokenizer_fingerprint
    dtype = token_dtype(fingerprint["vocab_size"])
    count = args.sequences * source.settings.seq_length
    ids = np.fromfile(f"{args.data_path}.bin", dtype=dtype, count=count).astype(np.int64)
    model = Model(source, torch.from_numpy(ids).view(args.sequences, -1))
    rows = [
        {
            "weights": "as trained",
            "output_error": 0.0,
            "worst_output_error": 0.0,
            "logit_error": 0.0,
            "loss": model.loss(model.logits),
            "size_of_fp16": 1.0,
        }
    ]
    columns = [model.weights[name].shape[1] for name in model.linears]
    for bits in (8, 4):
        for group_size in GROUP_SIZES:
            if group_size is None or all(size % group_size == 0 for size in columns):
                label = f"INT{bits}, " + (f"groups of {group_size}" if group_size else "row")
                rows.append(model.row(label, bits, group_size))
    print_table(rows)
    settings = {"sequences": args.sequences, **asdict(source.settings.dimensions),
                "iteration": source.iteration}  # fmt: skip
    print(f"record: {write_record('quantization', settings, rows)}")


if __name__ == "__main__":
    main()
