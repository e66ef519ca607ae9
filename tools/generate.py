"""Fills the blanks of a text with a GLM.

    python tools/generate.py --load CHECKPOINT --tokenizer-type HuggingFaceTokenizer \\
        --tokenizer-model tokenizer.json --prompt "The [MASK] of France is [MASK]."

A text may hold any number of [MASK] (a few words) and [sMASK] (sentences), or one [gMASK] (a long
text, to the end), which is added where there is no blank. Without --prompt, every line of --input
or of standard input is one; on a terminal it asks for them.
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import torch  # noqa: E402

from megatron_glm.checkpoint.formats import FORMATS, open_checkpoint  # noqa: E402
from megatron_glm.checkpoint.settings import ANGLE_DTYPES  # noqa: E402
from megatron_glm.checkpoint.table import Format  # noqa: E402
from megatron_glm.data.tokenizer import (  # noqa: E402
    TEXT_SCHEMES,
    TOKENIZER_TYPES,
    build_tokenizer,
)
from megatron_glm.errors import GLMError, exit_with_one_line, flag_of  # noqa: E402
from megatron_glm.inference.generation import Filler, run  # noqa: E402
from megatron_glm.inference.layout import Layout, default_device, process_group  # noqa: E402
from megatron_glm.inference.loading import load_filler  # noqa: E402
from megatron_glm.inference.search import Search, SearchConfig  # noqa: E402
from megatron_glm.inference.service import Service, follow  # noqa: E402

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
        group.add_argument(flag_of(name), type=kind, default=default,
                           help=f"{text}; default: {default}")
    group.add_argument("--max-batch-size", type=int, default=16,
                       help="texts, or beams of all texts, at a time; default: 16")
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--serve", action="store_true", help="answer POST /generate over HTTP, texts of many "
        "clients in one batch; search flags are what a request does not say, and it may ask for "
        "no more than --max-new-tokens")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add("--port", type=int, default=8000, help="0 for any that is free; default: 8000")
    add("--max-body-bytes", type=int, default=1 << 20, help="of a request; default: 1 MiB")
    add("--max-waiting", type=int, default=256,
        help="requests that may wait for a place in the batch; default: 256")
    args = parser.parse_args(arguments)
    if args.serve and (args.prompt or args.input):
        parser.error("--serve takes texts over HTTP; drop --prompt and --input, or --serve")
    return args


@contextmanager
def loaded(args: argparse.Namespace, layout: Layout, device: torch.device) -> Iterator[Filler]:
    """The model, and the codec of its texts."""
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    source = open_checkpoint(
        args.load, args.format and Format(args.format), args.num_attention_heads, args.ckpt_step
    )
    source.settings = source.settings.with_overrides(rotary_angle_dtype=args.rotary_angle_dtype)
    dtype = args.dtype and DTYPES[args.dtype]
    filler = load_filler(source, tokenizer, layout, device, dtype, args.quantization_bit_width)
    try:
        yield filler
    finally:
        if filler.engine.graphs is not None:
            # Before the process group goes.
            filler.engine.graphs.clear()


def texts(args: argparse.Namespace) -> Iterator[tuple[list[str], bool]]:
    """What to fill, as many texts at a time as are there, and whether a person waits for it."""
    if args.prompt:
        yield args.prompt, False
    elif args.input:
        try:
            lines = args.input.read_text().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise GLMError(f"--input {args.input}: cannot be read ({error})") from None
        yield [line for line in lines if line.strip()], False
    elif not sys.stdin.isatty():
        keep_foreign_bytes(sys.stdin)
        yield [line.rstrip("\n") for line in sys.stdin if line.strip()], False
    else:
        keep_foreign_bytes(sys.stdin)
        while line := ask():
            yield [line], True


def keep_foreign_bytes(stream: TextIO) -> None:
    """Has bytes that are not UTF-8 refused with their text, rather than with all that follows."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def ask() -> str | None:
    try:
        return input("text with [MASK], [sMASK] or [gMASK] (empty to end): ").strip() or None
    except EOFError:
        return None


def report(text: str, search: Search, filler: Filler, as_json: bool) -> str:
    completion = filler.completion(search)
    if as_json:
        return json.dumps({"prompt": text, **asdict(completion)}, ensure_ascii=False)
    return filler.codec.join(search.prompt, completion.fills, MARKS)


def fill(args: argparse.Namespace, filler: Filler, prompts: list[str]) -> Iterator[str]:
    """What to print for each text, in their order."""
    searches = []
    for number, text in enumerate(prompts):
        # A seed of its own for each, or the same text would be filled the same way every time.
        config = search_config(args, args.seed + number)
        searches.append(filler.search(filler.codec.encode(text, args.multitask), config))
    for _ in run(filler.engine, searches, args.max_batch_size):
        pass
    for text, search in zip(prompts, searches, strict=True):
        yield report(text, search, filler, args.json)


def search_config(args: argparse.Namespace, seed: int) -> SearchConfig:
    values = {field.name: getattr(args, field.name) for field in fields(SearchConfig)}
    try:
        return SearchConfig(**values | {"seed": seed})
    except GLMError as error:
        names = "|".join(values)
        in_flags = re.sub(rf"\b({names})\b", lambda name: flag_of(name[0]), str(error))
        raise GLMError(in_flags) from error


def serve(args: argparse.Namespace, layout: Layout, device: torch.device) -> None:
    if not layout.is_driver:
        with loaded(args, layout, device) as filler:
            follow(filler, layout, (), lambda running: None)
        return
    # Imported where it is needed: a web framework takes a second.
    from megatron_glm.inference.server import ServerConfig, bind, run_server

    config = ServerConfig(args.host, args.port, args.max_body_bytes, args.max_new_tokens)
    with bind(config) as bound, loaded(args, layout, device) as filler:
        service = Service(filler, layout, args.max_batch_size, args.max_waiting)
        announce = partial(print, flush=True)
        run_server(service, search_config(args, args.seed), config, bound, announce)


def check_args(args: argparse.Namespace) -> None:
    """GLMError where a number is outside its range."""
    ranges = {
        "tensor_model_parallel_size": (1, sys.maxsize),
        "pipeline_model_parallel_size": (1, sys.maxsize),
        "max_batch_size": (1, sys.maxsize),
        "max_body_bytes": (1, sys.maxsize),
        "max_waiting": (0, sys.maxsize),
        "port": (0, 65535),
    }
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if not least <= value <= most:
            rule = f"at least {least}" if most == sys.maxsize else f"from {least} to {most}"
            raise GLMError(f"{flag_of(name)} {value}: must be {rule}")


def generate(args: argparse.Namespace) -> None:
    check_args(args)
    device = default_device()
    with process_group(device):
        run_tool(args, device)


def run_tool(args: argparse.Namespace, device: torch.device) -> None:
    layout = Layout.create(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    if args.serve:
        serve(args, layout, device)
        return
    with loaded(args, layout, device) as filler:
        for prompts, is_dialogue in layout.shared(texts(args)):
            try:
                for line in fill(args, filler, prompts):
                    if layout.is_driver:
                        print(line, flush=True)
            except GLMError as error:
                if not is_dialogue:
                    raise
                if layout.is_driver:
                    print(f"error: {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with exit_with_one_line():
        generate(args)


if __name__ == "__main__":
    main()
