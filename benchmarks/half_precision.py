"""Counts the steps that fp16 skips in 500 of 12 layers: `python -m benchmarks.half_precision`.

One process of pretrain_glm.py a dtype, from the same seed, on tokens of which each has four likely
successors; tiny on a CPU (minutes), of a real size on a GPU. A step is skipped where the scaled
gradients overflow, and the dynamic loss scale halves. Flags of pretrain_glm.py that this program
does not know are handed on. Prints a table and writes a record.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models

import patches

patches.apply()

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from benchmarks.records import ROOT, Check, add_run_flags, run_benchmark  # noqa: E402
from megatron_glm.data.codecs.base import SPECIAL_TOKENS  # noqa: E402
from megatron_glm.data.tokenizer import build_tokenizer  # noqa: E402
from megatron_glm.training.log_lines import read_line  # noqa: E402

SIZES = {
    "cpu": {"hidden": 64, "heads": 4, "seq_length": 128, "micro_batch": 4, "batch": 4,
            "vocabulary": 128, "lr": 2e-3},
    "cuda": {"hidden": 1024, "heads": 16, "seq_length": 1024, "micro_batch": 8, "batch": 32,
             "vocabulary": 32768, "lr": 4e-4},
}  # fmt: skip
# On a GPU 500 steps in fp32 take longer than all else.
DTYPES = {"cpu": ["fp16", "fp32"], "cuda": ["fp16", "bf16"]}
NUM_LAYERS = 12
DOCUMENT = 400


def corpus_flags(folder: Path, vocabulary: int, num_tokens: int) -> list[str]:
    """Makes a corpus with something to learn; returns the flags of a run on it."""
    rng = np.random.RandomState(0)
    words = {f"w{index}": index for index in range(vocabulary - len(SPECIAL_TOKENS))}
    model = folder / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(model))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    successors = rng.randint(0, len(words), (len(words), 4))
    num_documents = 1 + num_tokens // DOCUMENT
    choices = rng.randint(0, 4, (DOCUMENT, num_documents))
    tokens = np.empty((DOCUMENT, num_documents), np.int32)
    tokens[0] = rng.randint(0, len(words), num_documents)
    for place in range(1, DOCUMENT):
        tokens[place] = successors[tokens[place - 1], choices[place]]
    tokens[-1] = tokenizer.eod
    builder = IndexedDatasetBuilder(f"{folder / 'text_document'}.bin", dtype=np.int32)
    for document in tokens.T:
        builder.add_document(document, [DOCUMENT])
    builder.finalize(f"{folder / 'text_document'}.idx")
    return ["--data-path", str(folder / "text_document"), "--split", "1,0,0", "--tokenizer-type",
            "HuggingFaceTokenizer", "--tokenizer-model", str(model)]  # fmt: skip


def train(arguments: argparse.Namespace, dtype: str, corpus: list[str]) -> dict:
    """One row: what a run reports of its steps, the first tenth of which are the warm-up."""
    warm_up = arguments.steps // 10
    flags = [
        "--num-layers", NUM_LAYERS, "--hidden-size", arguments.hidden,
        "--ffn-hidden-size", round(arguments.hidden * 8 / 3 / 16) * 16,
        "--num-attention-heads", arguments.heads, "--seq-length", arguments.seq_length,
        "--micro-batch-size", arguments.micro_batch, "--global-batch-size", arguments.batch,
        "--train-iters", arguments.steps, "--lr", arguments.lr, "--min-lr", arguments.lr / 10,
        "--lr-warmup-iters", warm_up, "--eval-iters", 0, "--log-interval", 1, "--num-workers", 0,
        "--seed", 7, *corpus, *([] if dtype == "fp32" else [f"--{dtype}"]), *arguments.flags,
    ]  # fmt: skip
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "0"}  # fmt: skip
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "pretrain_glm.py", *map(str, flags)], cwd=ROOT, text=True,
        env=os.environ | ranks, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    steps = [step for line in run.stdout.splitlines() if (step := read_line(line))]
    if run.returncode or len(steps) != arguments.steps:
        return {"dtype": dtype, "error": (run.stdout.strip() or "no output").splitlines()[-1]}
    skipped = [index for index, step in enumerate(steps) if step.num_skipped]
    scales = [step.loss_scale for step in steps]
    losses = [step.losses[""] for step in steps if not step.num_skipped] or [float("nan")]
    return {
        "dtype": dtype,
        "steps": len(steps),
        "skipped_in_warm_up": sum(index < warm_up for index in skipped),
        "skipped_after": sum(index >= warm_up for index in skipped),
        "smallest_scale": min(scales),
        "largest_scale": max(scales),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-20:])),
        "largest_norm": max(step.grad_norm or 0.0 for step in steps),
        "seconds": time.perf_counter() - start,
    }


def judge(rows: list[dict]) -> list[Check]:
    """No step is skipped, and what is learned is what the other types learn."""
    done = {row["dtype"]: row for row in rows}
    if "fp16" not in done:
        return []
    fp16 = done.pop("fp16")
    checks = [Check("steps that fp16 skipped after the warm-up (figure 5)",
                    fp16.get("skipped_after"), 0, is_floor=False, why=fp16.get("error", ""))]
    for dtype, other in done.items():
        if fp16.get("last_loss") and other.get("last_loss"):
            ratio = fp16["last_loss"] / other["last_loss"]
            checks.append(Check(f"last loss in fp16 / {dtype}", ratio, 1.01, is_floor=False))
    return checks


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, value in SIZES[device].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--dtypes", nargs="+", choices=["fp16", "bf16", "fp32"],
                        default=DTYPES[device])  # fmt: skip
    add_run_flags(parser)
    arguments, arguments.flags = parser.parse_known_args(argv)
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    num_tokens = arguments.steps * arguments.batch * arguments.seq_length
    with tempfile.TemporaryDirectory() as folder:
        corpus = corpus_flags(Path(folder), arguments.vocabulary, num_tokens)

        def rows() -> Iterator[dict]:
            for dtype in arguments.dtypes:
                yield train(arguments, dtype, corpus)

        run_benchmark("half_precision", arguments, rows(), judge=judge)


if __name__ == "__main__":
    main()
