"""Turn files of text into Megatron's indexed datasets.

    python tools/preprocess_data.py --input FILE|FOLDER|GLOB ... --output-prefix PREFIX \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer.json [--append-eod]

Writes PREFIX_<key>_document.{bin,idx} for each of --json-keys (inputs and targets for instruction
data), with .tokenizer.json and .checksums.json, which training compares, beside them; with
--split-sentences the names end in _sentence. Killed at any moment, the same command goes on where
it was and ends with the same bytes.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from megatron_glm.data.codecs import CODECS, TEXT_SCHEMES, build_codec
from megatron_glm.data.preprocessing.encoding import Encoder
from megatron_glm.data.preprocessing.inputs import InputFile, add_input_flags, find_inputs
from megatron_glm.data.preprocessing.output import REJECTS, Output
from megatron_glm.data.preprocessing.run import num_processors, run
from megatron_glm.data.preprocessing.snapshot import Snapshot
from megatron_glm.errors import GLMError, exit_with_one_line

# tqdm's monitor thread would be there when the workers are forked.
tqdm.monitor_interval = 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("input")
    add_input_flags(group)
    group.add_argument("--text-documents", choices=("file", "blank-line"), default="file",
                       help="plain text: a document is a whole file (default), or ends at a blank "
                            "line")
    group.add_argument("--split-sentences", action="store_true",
                       help="make every sentence a sequence of its own")
    group.add_argument("--max-rejects", type=int, default=0,
                       help="bad documents to leave out before giving up; default: 0")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", choices=list(CODECS), required=True)
    group.add_argument("--tokenizer-model", required=True, help="tokenizer.json or .model file")
    group.add_argument("--text-scheme", choices=TEXT_SCHEMES,
                       help="IceTokenizer: collapse white space (default), or give it tokens")
    group.add_argument("--append-eod", action="store_true", help="end every document with <eod>")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, help="path without suffix")
    group.add_argument("--overwrite", action="store_true",
                       help="delete what a finished or other run has left under this prefix")
    group = parser.add_argument_group("run")
    group.add_argument("--workers", type=int, default=num_processors(),
                       help="processes; default: as many as processors")
    group.add_argument("--checkpoint-seconds", type=float, default=5.0,
                       help="seconds of work that a kill may cost; default: 5")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """GLMError where a value cannot be used."""
    if args.workers < 1:
        raise GLMError(f"--workers {args.workers}: at least 1")
    if args.max_rejects < 0:
        raise GLMError(f"--max-rejects {args.max_rejects}: at least 0")
    if len(set(args.json_keys)) < len(args.json_keys) or any("/" in k for k in args.json_keys):
        raise GLMError(
            f"--json-keys {' '.join(args.json_keys)}: each once, and without a slash, since they "
            "become parts of file names"
        )


def drop_own_files(files: list[InputFile], prefix: str) -> list[InputFile]:
    """Leaves out what this tool writes under the prefix: a folder may hold input and output."""
    partial = os.path.abspath(f"{prefix}.partial")
    own = (partial + os.sep, os.path.abspath(f"{prefix}.{REJECTS}"))
    return [file for file in files if not os.path.abspath(file.path).startswith(own)]


def preprocess(args: argparse.Namespace) -> None:
    """The whole tool; GLMError for what a user can cure."""
    check_args(args)
    files = drop_own_files(find_inputs(args.input, args.input_format), args.output_prefix)
    if len(args.json_keys) > 1 and any(file.format == "text" for file in files):
        raise GLMError(
            f"--json-keys {' '.join(args.json_keys)}: plain text has but one; give jsonl or parquet"
        )
    codec = build_codec(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    settings = {
        "json_keys": args.json_keys,
        "text_documents": args.text_documents,
        "split_sentences": args.split_sentences,
        "append_eod": args.append_eod,
        "tokenizer": codec.fingerprint,
    }
    level = "sentence" if args.split_sentences else "document"
    output = Output(args.output_prefix, settings, files, args.json_keys, level, codec)
    if not args.overwrite and output.is_complete():
        print(f"{args.output_prefix}: already complete")
        return
    output.open(args.overwrite)
    encoder = Encoder(codec, args.json_keys, args.append_eod, args.split_sentences)
    with make_bar(sum(file.num_bytes for file in files), output.now) as bar:
        run(output, files, encoder, args.text_documents, args.workers, args.max_rejects,
            args.checkpoint_seconds, lambda now: advance(bar, now))
    if not output.now.num_documents:
        raise GLMError(f"--input {' '.join(args.input)}: holds no documents")
    summary = output.finish()
    print(
        f"{summary['num_documents']} documents, {summary['num_tokens']} tokens, "
        f"{summary['num_rejects']} rejects: {' '.join(summary['datasets'])}"
    )


def make_bar(total: int, now: Snapshot) -> tqdm:
    """A bar over the bytes of the inputs; where it is no terminal, a line from time to time."""
    interval = 0.5 if sys.stderr.isatty() else 10
    return tqdm(total=total, initial=min(now.num_input_bytes, total), unit="B", unit_scale=True,
                mininterval=interval, desc="preprocess")


def advance(bar: tqdm, now: Snapshot) -> None:
    """Shows how far the output is."""
    bar.set_postfix_str(
        f"{tqdm.format_sizeof(now.num_tokens)} tokens, {now.num_rejects} rejects", refresh=False
    )
    bar.update(min(now.num_input_bytes, bar.total) - bar.n)


def main() -> None:
    args = parse_args()
    with exit_with_one_line(after_interrupt="the same command goes on from here"):
        preprocess(args)


if __name__ == "__main__":
    main()
