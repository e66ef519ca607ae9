"""Small corpora and a tokenizer for tests."""

from collections import OrderedDict

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_glm.data.config import GLMDatasetConfig

VOCAB_SIZE = 1010


class Tokenizer:
    """Ids below 1000 are text; every tenth ends a sentence."""

    vocab_size = VOCAB_SIZE
    mask, gmask, smask, sop, eop, eod, pad = range(1000, 1007)
    fingerprint = {"type": "test", "vocab_size": VOCAB_SIZE}
    unique_identifiers = OrderedDict(fingerprint)

    def detokenize(self, ids):
        return "".join("." if index % 10 == 0 else "x" for index in ids)


TOKENIZER = Tokenizer()


def write_documents(prefix, documents, dtype=np.uint16):
    """PREFIX.bin and PREFIX.idx of lists of ids, one document each."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.asarray(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(seed, count, mean_length, append_eod=True):
    rng = np.random.RandomState(seed)
    end = [Tokenizer.eod] if append_eod else []
    return [
        np.append(rng.randint(0, 1000, 1 + int(rng.exponential(mean_length))), end).astype(int)
        for _ in range(count)
    ]


def write_prompts(prefix, samples):
    """Prompt/target data under a prefix, as tools/preprocess_data.py names it."""
    write_documents(f"{prefix}_inputs_document", [prompt for prompt, _ in samples])
    write_documents(f"{prefix}_targets_document", [target for _, target in samples])
    return str(prefix)


def random_prompts(seed, count, mean_prompt=60, mean_target=15):
    rng = np.random.RandomState(seed)
    return [
        (rng.randint(0, 1000, 1 + int(rng.exponential(mean_prompt))),
         rng.randint(0, 1000, 1 + int(rng.exponential(mean_target))))
        for _ in range(count)
    ]


def make_config(*prefixes, weights=None, split="100,0,0", sequence_length=2048, **fields):
    return GLMDatasetConfig(**{
        "random_seed": 1234, "sequence_length": sequence_length, "tokenizer": TOKENIZER,
        "blend": (list(map(str, prefixes)), weights), "split": split,
    } | fields)
