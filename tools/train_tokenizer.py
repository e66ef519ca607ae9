"""Train a tokenizer on a corpus: byte-level BPE by default, SentencePiece on request.

    python tools/train_tokenizer.py --input FILE|FOLDER|GLOB ... --vocab-size 16000 \\
        --output tokenizer.json

Reads what tools/preprocess_data.py reads. The special tokens of GLM are part of the vocabulary.
Either kind gives back every text as it was: bytes stand in for unknown characters, nothing is
normalised and no white space is dropped (SentencePiece reads U+2581 as a space).
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_glm.data.codecs.training import train_byte_level_bpe, train_sentence_piece
from megatron_glm.data.preprocessing.blocks import Cursor, read_blocks
from megatron_glm.data.preprocessing.documents import Document, read_documents
from megatron_glm.data.preprocessing.inputs import add_input_flags, find_inputs
from megatron_glm.errors import GLMError, exit_with_one_line

TRAINERS = {
    "HuggingFaceTokenizer": train_byte_level_bpe,
    "SentencePieceTokenizer": train_sentence_piece,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_input_flags(parser)
    parser.add_argument("--max-bytes", type=int,
                        help="bytes of the inputs to train on, spread over them; default: all")
    parser.add_argument("--tokenizer-type", choices=list(TRAINERS), default="HuggingFaceTokenizer",
                        help="HuggingFaceTokenizer (default): byte-level BPE in a tokenizer.json; "
                             "SentencePieceTokenizer: BPE in a .model")
    parser.add_argument("--vocab-size", type=int, required=True,
                        help="tokens, the special ones included")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    return parser.parse_args()


def read_texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts of the corpus, under a progress bar; what cannot be read is passed over.

    GLMError where nothing can be read, with the reason.
    """
    files = find_inputs(args.input, args.input_format)
    total = sum(file.num_bytes for file in files)
    share = min(1.0, (args.max_bytes or total) / max(1, total))
    taken = seen = num_documents = num_rejects = 0
    interval = 0.5 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="B", unit_scale=True, desc="read", mininterval=interval) as bar:
        for block in read_blocks(files, args.json_keys, "file", Cursor()):
            bar.update(block.num_bytes)
            seen += block.num_bytes
            if taken > share * seen:
                continue
            taken += block.num_bytes
            for item in read_documents(block, args.json_keys):
                if isinstance(item, Document):
                    num_documents += 1
                    yield from item.texts
                else:
                    num_rejects += 1
                    last = f"the last: {item.file} line {item.line} ({item.reason})"
    if not num_documents:
        fault = "holds no documents"
        if num_rejects:
            fault = f"none of {num_rejects} documents can be read; {last}"
        raise GLMError(f"--input {' '.join(args.input)}: {fault}")
    if num_rejects:
        print(f"{num_rejects} bad documents were passed over; {last}", file=sys.stderr)


def train(args: argparse.Namespace) -> None:
    """The whole tool; GLMError for what a user can cure."""
    if args.max_bytes is not None and args.max_bytes < 1:
        raise GLMError(f"--max-bytes {args.max_bytes}: at least 1")
    if args.output.is_dir():
        raise GLMError(f"--output {args.output}: is a folder; name a file")
    if args.output.exists() and not args.overwrite:
        raise GLMError(f"--output {args.output}: exists; choose another, or give --overwrite")
    # Where that cannot be, training would be for nothing.
    args.output.parent.mkdir(parents=True, exist_ok=True)
    data = TRAINERS[args.tokenizer_type](read_texts(args), args.vocab_size)
    temporary = args.output.with_name(args.output.name + ".new")
    temporary.write_bytes(data)
    os.replace(temporary, args.output)
    print(f"{args.output}: {args.vocab_size} tokens; use --tokenizer-type {args.tokenizer_type} "
          f"--tokenizer-model {args.output}")


def main() -> None:
    args = parse_args()
    with exit_with_one_line():
        train(args)


if __name__ == "__main__":
    main()
