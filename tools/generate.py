"""Fills the blanks of a text with a GLM.

    python tools/generate.py --load CHECKPOINT --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer.json --prompt "The [MASK] of France is [MASK]."

A text may hold any number of [MASK] (a few words) and [sMASK] (sentences), or one [gMASK] (a long
text, to the end), which is added where there is no blank. Without --prompt, every line of --input
or of standard input is one; on a terminal it asks for them.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

# Which patches there are, and that Megatron trains without Transformer Engine, is of no interest.
logging.getLogger("patches").setLevel(logging.WARNING)
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    patches.apply()

import torch  # noqa: E402

from megatron_glm.checkpoint.errors import CheckpointError  # noqa: E402
from megatron_glm.checkpoint.formats import FORMATS, open_checkpoint  # noqa: E402
from megatron_glm.checkpoint.settings import ANGLE_DTYPES  # noqa: E402
from megatron_glm.checkpoint.table import Format  # noqa: E402
from megatron_glm.data.tokenizer import (  # noqa: E402
    TEXT_SCHEMES,
    TOKENIZER_TYPES,
    build_tokenizer,
)
from megatron_glm.errors import GLMError  # noqa: E402
from megatron_glm.inference.blanks import BlankCodec  # noqa: E402
from megatron_glm.inference.engine import Engine  # noqa: E402
from megatron_glm.inference.generation import new_search, run  # noqa: E402
from megatron_glm.inference.layout import Layout, default_device, start_processes  # noqa: E402
from megatron_glm.inference.search import Ends, Search, SearchConfig  # noqa: E402
from megatron_glm.inference.weights import Weights  # noqa: E402

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What stands around a filled blank.
MARKS = ("⟦", "⟧")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--load", type=Path, required=True, help="folder of a checkpoint")
    add("--format", choices=FORMATS, help="of the checkpoint; default: by what the folder holds")
    add("--ckpt-step", type=int, help="iteration of a Megatron checkpoint; default: the latest")
    add("--num-attention-heads", type=int, help="for SAT files without rotary frequencies")
    add("--rotary-angle-dtype", choices=ANGLE_DTYPES, help="what the weights were trained with; "
        "default: as the checkpoint says, fp16 for SAT")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    add("--tokenizer-model", type=Path, required=True, help="tokenizer.json or .model file")
    add("--text-scheme", choices=TEXT_SCHEMES, help="of an IceTokenizer")
    add("--dtype", choices=DTYPES, help="of the arithmetic and of weights that are not quantised; "
        "default: fp32 on a CPU, that of the checkpoint on a GPU")
    add("--quantization-bit-width", type=int, choices=(8, 4),
        help="quantise the linear weights of the layers on loading")
    add("--tensor-model-parallel-size", type=int, default=1, help="processes that share each layer")
    add("--pipeline-model-parallel-size", type=int, default=1,
        help="groups of processes that share the layers; start all by torchrun")
    group = parser.add_argument_group("text")
    add = group.add_argument
    add("--prompt", action="append", help="a text with blanks; can be given several times")
    add("--input", type=Path, help="file with a text a line")
    add("--multitask", action="store_true",
        help="texts are instructions that end in [MASK], answered as in multitask training")
    add("--json", action="store_true", help="print a JSON object a line: prompt, text, fills ...")
    group = parser.add_argument_group("search")
    defaults = SearchConfig()
    for name, kind, text in (
        ("max_new_tokens", int, "tokens at most, over all blanks of a text"),
        ("num_beams", int, "beams of a beam search; 1 takes a token at a time"),
        ("length_penalty", float, "exponent of the length that divides a beam's score; above 0 "
         "favours longer ones"),
        ("temperature", float, "0 takes the likeliest token, above 0 draws"),
        ("top_k", int, "draw from that many of the likeliest tokens; 0 for all"),
        ("top_p", float, "draw from the likeliest tokens of so much probability together"),
        ("no_repeat_ngram_size", int, "no n-gram of so many tokens appears twice; 0 allows all"),
        ("seed", int, "of the draws"),
    ):
        default = getattr(defaults, name)
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default,
                           help=f"{text}; default: {default}")
    group.add_argument("--max-batch-size", type=int, default=16,
                       help="texts, or beams of all texts, at a time; default: 16")
    return parser.parse_args(arguments)


def load(args: argparse.Namespace, layout: Layout, device: torch.device) -> tuple:
    """The engine with a checkpoint's weights, and the codec of its texts."""
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    source = open_checkpoint(
        args.load, args.format and Format(args.format), args.num_attention_heads, args.ckpt_step
    )
    settings = source.settings.with_overrides(rotary_angle_dtype=args.rotary_angle_dtype)
    check_tokenizer(args, tokenizer, settings)
    dtype = DTYPES[args.dtype] if args.dtype else source.dtype
    if args.dtype is None and device.type == "cpu":
        dtype = torch.float32
    weights = Weights(source, layout, device, dtype, args.quantization_bit_width)
    codec = BlankCodec(tokenizer, settings.unified_multitask_encoding)
    return Engine(settings, weights, layout), codec


def check_tokenizer(args: argparse.Namespace, tokenizer, settings) -> None:
    known, given = settings.tokenizer_fingerprint, tokenizer.fingerprint
    if known is not None and known != given:
        raise CheckpointError(
            f"--tokenizer-model {args.tokenizer_model}: is {given}; {args.load} was trained with "
            f"{known}, with which ids mean other text: give that file"
        )
    if tokenizer.vocab_size > settings.dimensions.vocab_size:
        raise CheckpointError(
            f"--tokenizer-model {args.tokenizer_model}: has {tokenizer.vocab_size} tokens, more "
            f"than the {settings.dimensions.vocab_size} of {args.load}: give the file that it was "
            "trained with"
        )


def texts(args: argparse.Namespace) -> Iterator[list[str]]:
    """What to fill, as many texts at a time as are there."""
    if args.prompt:
        yield args.prompt
    elif args.input:
        try:
            yield [line for line in args.input.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise GLMError(f"--input {args.input}: cannot be read ({error})") from None
    elif not sys.stdin.isatty():
        yield [line.rstrip("\n") for line in sys.stdin if line.strip()]
    else:
        while line := ask():
            yield [line]


def ask() -> str | None:
    try:
        return input("text with [MASK], [sMASK] or [gMASK] (empty to end): ").strip() or None
    except EOFError:
        return None


def report(prompt_text: str, search: Search, codec: BlankCodec, as_json: bool) -> str:
    fills = codec.fill(search.prompt, search.best.generated)
    if not as_json:
        return codec.join(search.prompt, fills, MARKS)
    return json.dumps(
        {
            "prompt": prompt_text,
            "text": codec.join(search.prompt, fills),
            "fills": fills,
            "finish_reason": search.finish_reason,
            "num_context_tokens": len(search.prompt.context),
            "num_new_tokens": len(search.best.generated),
        },
        ensure_ascii=False,
    )


def fill(
    args: argparse.Namespace, engine: Engine, codec: BlankCodec, prompts: Iterable[str]
) -> Iterator[str]:
    """What to print for each text, in their order."""
    tokenizer = codec.tokenizer
    ends = Ends(tokenizer.sop, tokenizer.eop, tokenizer.eod)
    config = SearchConfig(**{name: getattr(args, name) for name in vars(SearchConfig())})
    searches = [
        new_search(codec.encode(text, args.multitask), config, ends, engine) for text in prompts
    ]
    for _ in run(engine, searches, args.max_batch_size):
        pass
    for text, search in zip(prompts, searches, strict=True):
        yield report(text, search, codec, args.json)


def generate(args: argparse.Namespace) -> None:
    device = default_device()
    start_processes(device)
    layout = Layout.create(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    engine, codec = load(args, layout, device)
    for prompts in layout.shared(texts(args)):
        for line in fill(args, engine, codec, prompts):
            if layout.is_driver:
                print(line, flush=True)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        generate(args)
    except GLMError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
