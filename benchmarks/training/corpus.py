"""A tokenizer and corpora of random tokens, for which packing and masks are those of real text."""

import json
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models

from megatron_glm.data.codecs.base import SPECIAL_TOKENS
from megatron_glm.data.tokenizer import build_tokenizer

# Tokens of a document of web text, and of prompts and targets, on average.
DOCUMENT, PROMPT, TARGET = 800, 250, 40


def corpus_flags(folder: Path, vocab_size: int, num_tokens: int) -> list[str]:
    """Makes text and prompt/target data in a folder; returns the flags of a run on them.

    vocab_size: of the tokenizer, special tokens included. num_tokens: of the text.
    """
    words = {f"w{index}": index for index in range(vocab_size - len(SPECIAL_TOKENS))}
    model = folder / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(model))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", model)
    rng = np.random.RandomState(0)
    # Lengths of documents are spread like those of web text.
    lengths = 1 + rng.lognormal(np.log(DOCUMENT) - 0.5, 1.0, 1 + num_tokens // DOCUMENT).astype(int)
    parts = {"text_document": (lengths, tokenizer.eod)}
    num_prompts = 1 + num_tokens // (10 * PROMPT)
    for name, mean in (("inputs", PROMPT), ("targets", TARGET)):
        parts[f"tasks_{name}_document"] = 1 + rng.geometric(1 / mean, num_prompts), None
    for name, (sizes, end) in parts.items():
        prefix = folder / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for size in sizes:
            ids = rng.randint(0, len(words), size).astype(np.int32)
            if end is not None:
                ids[-1] = end
            builder.add_document(ids, [size])
        builder.finalize(f"{prefix}.idx")
        Path(f"{prefix}.tokenizer.json").write_text(json.dumps(tokenizer.fingerprint))
    return [
        "--data-path", str(folder / "text_document"), "--split", "1000,0,0",
        "--multitask-data-path", str(folder / "tasks"),
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(model),
        "--padded-vocab-size", str(vocab_size),
    ]  # fmt: skip
