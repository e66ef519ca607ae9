"""Measures the data loader: sequences a second of one worker, and the first one after a restart.

    python benchmarks/dataset.py [--data-path PREFIX] [--seq-length 2048] [--sequences 2000]

Without --data-path a corpus of random tokens is made in a temporary folder: 20 million in documents
of a length distributed like that of web text, its files in the page cache. "One core" is processor
time, whatever else the machine does; the loader is timed by the clock. The restart is timed from
opening the files of a corpus of 2.2 billion tokens (sparse) to its 1,000,000,000th sequence.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.simplefilter("ignore")

import patches  # noqa: E402

patches.apply()

import logging  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402

from benchmarks.records import print_table, write_record  # noqa: E402
from megatron_glm.data.builder import MixedDataset, train_valid_test_datasets  # noqa: E402
from megatron_glm.data.config import GLMDatasetConfig  # noqa: E402
from megatron_glm.data.indexed import HEADER, MAGIC, VERSION  # noqa: E402

VOCAB_SIZE = 50000
TEXT_IDS = 49000
DTYPE_UINT16 = 8
# What a sequence is made of in each row of the table.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "[gMASK]": {"gpt_prob": 1.0},
    "[MASK]": {"gpt_prob": 0.0},
    "table 11": {},
    "table 11, documents apart": {"reset_attention_mask": True},
    "[sMASK]": {"gpt_prob": 0.0, "sentence_mask_prob": 1.0},
    "multitask": {"multitask_ratio": 1.0},
}
RESTART_INDEX = 10**9


def bench_tokenizer() -> SimpleNamespace:
    """Stands in for a tokenizer: every twentieth id ends a sentence."""
    specials = ("mask", "gmask", "smask", "sop", "eop", "eod", "pad")
    return SimpleNamespace(
        vocab_size=VOCAB_SIZE, fingerprint={}, unique_identifiers={},
        detokenize=lambda ids: "." if ids[0] % 20 == 0 else "x",
        **dict(zip(specials, range(TEXT_IDS, VOCAB_SIZE), strict=False)),
    )


def write_corpus(prefix: Path, num_tokens: int, mean_length: int, eod: int | None) -> str:
    """Documents of random tokens with log-normal lengths, as Megatron writes them."""
    rng = np.random.RandomState(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    total = 0
    while total < num_tokens:
        length = 1 + int(rng.lognormal(np.log(mean_length) - 0.5, 1.0))
        ids = rng.randint(0, TEXT_IDS, length).astype(np.uint16)
        if eod is not None:
            ids[-1] = eod
        builder.add_document(ids, [length])
        total += length
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_sparse_corpus(prefix: Path, num_documents: int, length: int) -> str:
    """Documents of zeros that take no room on disk."""
    with open(f"{prefix}.idx", "wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, DTYPE_UINT16, num_documents, num_documents + 1))
        stream.write(np.full(num_documents, length, dtype=np.int32).tobytes())
        stream.write((np.arange(num_documents, dtype=np.int64) * length * 2).tobytes())
        stream.write(np.arange(num_documents + 1, dtype=np.int64).tobytes())
    with open(f"{prefix}.bin", "wb") as stream:
        stream.truncate(num_documents * length * 2)
    return str(prefix)


def build(prefix: str, seq_length: int, **fields: Any) -> MixedDataset:
    """The training dataset of a corpus, of more samples than any run has."""
    config = GLMDatasetConfig(
        random_seed=1234, sequence_length=seq_length, tokenizer=bench_tokenizer(),
        blend=([prefix], None), split="100,0,0", **fields,
    )
    return train_valid_test_datasets(config, [2 * RESTART_INDEX, 0, 0])[0]


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(dataset: MixedDataset, num_sequences: int) -> dict[str, float]:
    """Sequences a second of processor time and through a loader of one worker; and padding."""
    items = [dataset[index] for index in range(200)]
    begin = time.process_time()
    for index in range(num_sequences):
        dataset[index]
    processor = time.process_time() - begin
    # A sampler of a slice: the workers must not see the length of the whole run.
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, range(num_sequences)), batch_size=8, num_workers=1
    )
    used = sum(int(item["sample_ends"][item["objectives"] >= 0].max()) for item in items)
    return {
        "sequences/s of one core": num_sequences / processor,
        "sequences/s, loader with 1 worker": num_sequences / seconds(lambda: list(loader)),
        "padding": 1 - used / (len(items) * len(items[0]["tokens"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-path", help="prefix of a corpus; default: made on the spot")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=2000, help="for each row of the table")
    parser.add_argument("--no-record", action="store_true", help="leave benchmarks/results alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("megatron_glm").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, eod = Path(name), bench_tokenizer().eod
        prefix = args.data_path or write_corpus(folder / "text", 20_000_000, 800, eod)
        for part, length in (("inputs", 250), ("targets", 40)):
            # The same number of samples in both.
            rng = np.random.RandomState(1)
            builder = IndexedDatasetBuilder(f"{folder}/qa_{part}_document.bin", dtype=np.uint16)
            for size in 1 + rng.geometric(1 / length, 20_000):
                builder.add_document(np.arange(size, dtype=np.uint16), [size])
            builder.finalize(f"{folder}/qa_{part}_document.idx")
        for objective, fields in OBJECTIVES.items():
            if objective == "multitask":
                fields = fields | {"multitask_data_path": [str(folder / "qa")]}
            dataset = build(prefix, args.seq_length, **fields)
            rows.append({"objective": objective} | measure(dataset, args.sequences))
        large = write_sparse_corpus(folder / "large", 2_200_000, 1000)
        restart = seconds(lambda: build(large, args.seq_length)[RESTART_INDEX])
    print_table(rows)
    print(f"first sequence after a restart at {RESTART_INDEX:,}: {restart:.2f} s")
    if not args.no_record:
        settings = vars(args) | {"restart_seconds": restart}
        print(write_record("dataset", settings, rows))


if __name__ == "__main__":
    main()
