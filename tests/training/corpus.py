"""A small corpus, its tokenizer and its indexed files, made from a seed."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from megatron_glm.data.tokenizer import build_tokenizer

VOCABULARY = 320


class Corpus(NamedTuple):
    prefix: str
    tokenizer_model: str

    @property
    def flags(self) -> list[str]:
        return [
            "--data-path", self.prefix, "--split", "8,1,1",
            "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer_model,
        ]


def make_corpus(
    folder: Path, num_documents: int = 400, seed: int = 0, tokenizer_model: str | None = None
) -> Corpus:
    """Documents of made-up words, some of which always follow each other, so that there is
    something to learn; with a tokenizer of their own unless one is given."""
    folder.mkdir(exist_ok=True)
    words = random.Random(seed)
    lexicon = ["".join(words.choices("abcdefghij", k=words.randint(2, 6))) for _ in range(200)]
    texts = []
    for _ in range(num_documents):
        at = words.randrange(200)
        chosen = []
        for _ in range(words.randint(20, 150)):
            at = (at * 7 + 3) % 200 if words.random() < 0.8 else words.randrange(200)
            chosen.append(lexicon[at])
        texts.append(" ".join(chosen))

    tokenizer_model = tokenizer_model or train_tokenizer(texts, folder / "tokenizer.json")
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_model)
    prefix = str(folder / "corpus_text_document")
    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for text in texts:
        builder.add_item(torch.tensor([*tokenizer.tokenize(text), tokenizer.eod]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    Path(f"{prefix}.tokenizer.json").write_text(json.dumps(tokenizer.fingerprint))
    return Corpus(prefix, tokenizer_model)


def train_tokenizer(texts: list[str], file: Path) -> str:
    """A byte-level BPE of VOCABULARY tokens; returns the name of its file."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, show_progress=False, initial_alphabet=alphabet
        ),
    )
    model.save(str(file))
    return str(file)
