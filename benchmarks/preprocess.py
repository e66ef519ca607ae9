"""Measures preprocessing against its own tokenizer alone and against Megatron-LM's tool.

    python benchmarks/preprocess.py [--megabytes 60] [--workers 2] [--keep FOLDER]

Source text of the standard library and the installed packages, in documents of 4 KB, one JSON
object a line. Every row does the same work with the same tokenizer on the same number of cores:

- "tokenizer alone": the library encodes texts that are in memory, in batches, on as many threads;
  nothing is read, nothing is kept.
- "Megatron-LM's tool": a stand-in of its shape: a pool of processes that each parse a line and
  encode one document at a time, one process that appends the results to an IndexedDatasetBuilder.
  Its imports are not counted.
- "ours": tools/preprocess_data.py as a user starts it, Python's start included.

Every id that ours wrote is compared with every id of the stand-in. Ratios are of times by the
clock and, less dependent on what else the machine does, of processor time (cpu).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import batched
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

import sentencepiece  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from megatron_glm.data.codecs.training import (  # noqa: E402
    train_byte_level_bpe,
    train_sentence_piece,
)

DOCUMENT_CHARACTERS = 4096
TRAINED_SHARE = 6
BATCH = 1000
TOOL = ROOT / "tools" / "preprocess_data.py"
# Turns the remembered words off: the pipeline around the Rust tokenizer itself.
WITHOUT_WORDS = (
    "from megatron_glm.data.codecs.words import WordEncoder;"
    "WordEncoder.build = staticmethod(lambda *_: None);"
    "from tools.preprocess_data import main; main()"
)


def source_documents(num_bytes: int) -> Iterator[str]:
    """Documents of Python source, about so many bytes in all."""
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            if Path(root) == Path(paths["stdlib"]) and "site-packages" in path.parts:
                continue
            try:
                text = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                document = text[start : start + DOCUMENT_CHARACTERS]
                num_bytes -= len(document.encode())
                yield document
            if num_bytes <= 0:
                return


class Timed:
    """Seconds by the clock and of the processor (of child processes too, once they have ended)."""

    def __enter__(self) -> "Timed":
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu_seconds = (
            now - start for now, start in zip(self._now(), self._start, strict=True)
        )

    @staticmethod
    def _now() -> tuple[float, float]:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return time.perf_counter(), sum(u.ru_utime + u.ru_stime for u in usages)


# -- the rows


def rust_tokenizer(model: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model))
    # As ours: sources that write "[MASK]" mean the word.
    tokenizer.encode_special_tokens = True
    return tokenizer


def rust_alone(model: Path, documents: list[str], workers: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    tokenizer = rust_tokenizer(model)
    for batch in batched(documents, BATCH):
        tokenizer.encode_batch_fast(list(batch), add_special_tokens=False)


def sentence_piece_alone(model: Path, documents: list[str], workers: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for batch in batched(documents, BATCH):
        processor.encode(list(batch), num_threads=workers)


def import_megatron() -> tuple[Any, Any, Any]:
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return torch, DType, IndexedDatasetBuilder


def start_stand_in(model: Path) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if model.suffix == ".json":
        tokenizer = rust_tokenizer(model)
        _encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    else:
        _encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode


def encode_line(line: str) -> tuple[list[int], int]:
    return _encode(json.loads(line)["text"]), len(line)


def megatron_stand_in(model: Path, corpus: Path, prefix: Path, workers: int) -> None:
    torch, DType, IndexedDatasetBuilder = import_megatron()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(16000))
    pool = get_context("fork").Pool(workers, start_stand_in, (model,))
    with corpus.open() as lines:
        for ids, _ in pool.imap(encode_line, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")
    pool.close()
    pool.join()


def ours(
    model: Path, corpus: Path, prefix: Path, workers: int, with_words: bool = True
) -> None:
    kind = "HuggingFaceTokenizer" if model.suffix == ".json" else "SentencePieceTokenizer"
    program = [str(TOOL)] if with_words else ["-c", WITHOUT_WORDS]
    subprocess.run(
        [sys.executable, *program, "--input", str(corpus), "--output-prefix", str(prefix),
         "--tokenizer-type", kind, "--tokenizer-model", str(model), "--workers", str(workers),
         "--overwrite"],
        check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )


# -- the table


def measure(
    name: str, megabytes: float, repeats: int, work: Callable[..., None], rest: tuple
) -> dict[str, Any]:
    """The fastest of some runs, each in a process of its own so that none profits from another."""
    best: dict[str, Any] = {}
    for _ in range(repeats):
        # The program under test leaves its peak memory in its parent's statistics, so each run has
        # a parent of its own.
        receiver, sender = get_context("fork").Pipe(duplex=False)
        process = get_context("fork").Process(target=_measure_here, args=(work, rest, sender))
        process.start()
        timed = receiver.recv()
        process.join()
        if not best or timed["seconds"] < best["seconds"]:
            best = timed
    rates = {"MB/s": megabytes / best["seconds"], "MB/cpu-s": megabytes / best["cpu seconds"]}
    return {"": name} | best | rates


def _measure_here(work: Callable[..., None], rest: tuple, sender: Any) -> None:
    if work is megatron_stand_in:
        import_megatron()
    with Timed() as timed:
        work(*rest)
    peak = max(
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    sender.send({
        "seconds": timed.seconds, "cpu seconds": timed.cpu_seconds, "peak MB": peak / 1000,
    })


def compare_ids(prefix: Path, expected: Path) -> None:
    """Fails where a dataset is not byte for byte another one."""
    for suffix in (".bin", ".idx"):
        if Path(f"{prefix}{suffix}").read_bytes() != Path(f"{expected}{suffix}").read_bytes():
            sys.exit(f"{prefix}{suffix} differs from {expected}{suffix}")


def train(documents: list[str], bpe: Path, piece: Path) -> None:
    """Both tokenizers, on a share of the documents."""
    bpe.write_bytes(train_byte_level_bpe(documents[::TRAINED_SHARE], 16000))
    piece.write_bytes(train_sentence_piece(documents[::TRAINED_SHARE], 16000))


def run_rows(args: argparse.Namespace, folder: Path, corpus: Path) -> list[dict[str, Any]]:
    documents = [json.loads(line)["text"] for line in corpus.open()]
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    bpe, piece = folder / "tokenizer.json", folder / "tokenizer.model"
    if not bpe.exists():
        # In a process of its own: once the library has used threads, it has but one in every fork.
        with ProcessPoolExecutor(1, get_context("fork")) as other:
            other.submit(train, documents, bpe, piece).result()
    quarter = folder / "quarter.jsonl"
    with corpus.open() as lines:
        quarter.write_text("".join(line for i, line in enumerate(lines) if i % 4 == 0))

    def row(name: str, work: Callable[..., None], *rest: Any, share: float = 1) -> dict[str, Any]:
        print(name, flush=True)
        return measure(name, megabytes * share, args.repeats, work, rest)

    rows = []
    for model, alone in ((bpe, rust_alone), (piece, sentence_piece_alone)):
        kind = "BPE" if model is bpe else "SentencePiece"
        theirs, mine = folder / f"theirs_{kind}", folder / f"ours_{kind}"
        rows += [
            row(f"{kind}: tokenizer alone", alone, model, documents, args.workers),
            row(f"{kind}: Megatron-LM's tool", megatron_stand_in, model, corpus, theirs,
                args.workers),
            row(f"{kind}: ours", ours, model, corpus, mine, args.workers),
        ]
        compare_ids(Path(f"{mine}_text_document"), theirs)
        if model is bpe:
            other = folder / "ours_without_words"
            rows.append(row(f"{kind}: ours, words not remembered", ours, model, corpus, other,
                            args.workers, False))
            compare_ids(Path(f"{other}_text_document"), theirs)
            rows.append(row(f"{kind}: ours, a quarter of the text", ours, model, quarter,
                            folder / "ours_quarter", args.workers, share=0.25))
        add_ratios(rows, kind)
    return rows


def add_ratios(rows: list[dict[str, Any]], kind: str) -> None:
    """How many times as fast as the tokenizer alone and as Megatron-LM's tool."""
    of_kind = [row for row in rows if row[""].startswith(kind)]
    for row in of_kind:
        for unit, suffix in (("MB/s", ""), ("MB/cpu-s", " (cpu)")):
            row[f"x alone{suffix}"] = row[unit] / of_kind[0][unit]
            row[f"x Megatron{suffix}"] = row[unit] / of_kind[1][unit]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=60, help="size of the corpus")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads of each row")
    parser.add_argument("--repeats", type=int, default=1, help="runs a row; the best counts")
    parser.add_argument("--keep", type=Path, help="folder for corpus and datasets; default: none")
    parser.add_argument("--no-record", action="store_true", help="only print the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "corpus.jsonl"
        with corpus.open("w") as out:
            for text in source_documents(int(args.megabytes * 1e6)):
                out.write(json.dumps({"text": text}) + "\n")
        load = os.getloadavg()[0]
        rows = run_rows(args, folder, corpus)
    # Imports torch, which would be in every process that is measured.
    from benchmarks.records import print_table, write_record

    print_table(rows)
    print("every id equal")
    if not args.no_record:
        settings = {"megabytes": args.megabytes, "workers": args.workers, "repeats": args.repeats,
                    "load_before": load}
        print(write_record("preprocess", settings, rows))


if __name__ == "__main__":
    main()
