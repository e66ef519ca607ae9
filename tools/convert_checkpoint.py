"""Converts GLM checkpoints between Megatron, SAT (THUDM/GLM-130B) and Hugging Face.

    python tools/convert_checkpoint.py --from sat --to megatron --load glm-130b-sat --save glm-130b
    python tools/convert_checkpoint.py --from megatron --to sat --load run --save run-sat \\
        --target-tp 4 --quantization-bit-width 4
    python tools/convert_checkpoint.py --from megatron --to hf --load run --save run-hf \\
        --tokenizer-type IceTokenizer --tokenizer-model ice_text.model

Works on two tensors at a time, without a GPU and without other ranks, from any tensor, pipeline and
data parallel layout. The result appears under its name when it is whole, with conversion.json
beside it: settings, versions, and the hash of every tensor.
"""

import argparse
import os
import sys
from pathlib import Path

# Idle threads of torch would spin on the core that hashes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from megatron_glm.checkpoint.convert import (  # noqa: E402
    WORKING_BYTES,
    Conversion,
    Source,
    resident_bytes,
)
from megatron_glm.checkpoint.errors import CheckpointError  # noqa: E402
from megatron_glm.checkpoint.formats import FORMATS, open_checkpoint  # noqa: E402
from megatron_glm.checkpoint.hugging_face_writer import ExportedTokenizer  # noqa: E402
from megatron_glm.checkpoint.quantization import BIT_WIDTHS  # noqa: E402
from megatron_glm.checkpoint.record import is_conversion, write_record  # noqa: E402
from megatron_glm.checkpoint.settings import (  # noqa: E402
    ANGLE_DTYPES,
    Settings,
    Tokenizer,
    check_tokenizer,
)
from megatron_glm.checkpoint.staging import holds_something, staged_directory  # noqa: E402
from megatron_glm.checkpoint.table import Format, tensors  # noqa: E402
from megatron_glm.checkpoint.target import Request, plan_target  # noqa: E402
from megatron_glm.checkpoint.tokenizer_export import export_tokenizer, read_tokenizer  # noqa: E402
from megatron_glm.errors import exit_with_one_line  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", dest="source", choices=FORMATS, required=True, help="format of --load")
    add("--to", dest="target", choices=FORMATS, required=True, help="format of --save")
    add("--load", type=Path, required=True, help="folder to read")
    add("--save", type=Path, required=True, help="folder to write; must be empty or missing")
    add(
        "--overwrite",
        action="store_true",
        help="replace the conversion that --save holds, in one step at the end",
    )
    add(
        "--target-tp", type=int, help="shards of a SAT target, 1 to 8; default: as the source, or 1"
    )
    add(
        "--quantization-bit-width",
        type=int,
        choices=sorted(BIT_WIDTHS, reverse=True),
        help="quantise the linear weights of the layers; the released tools' INT8 or INT4",
    )
    add(
        "--quantization-group-size",
        type=int,
        help="columns that share a scale in a Hugging Face target, for example 128; default: a row",
    )
    add(
        "--dtype",
        choices=DTYPES,
        help="type of plain weights; default: fp16 for SAT, else as they "
        "are. Given for a quantised source, it asks for dequantised weights",
    )
    add("--ckpt-step", type=int, help="iteration of a Megatron source; default: the latest")
    add(
        "--iteration",
        type=int,
        help="iteration of the target. Default for Megatron: a release, "
        "which is loaded without optimizer states and trained from iteration 0; a number needs "
        "--no-load-optim --no-load-rng when it is loaded. Default for SAT: as the source",
    )
    add("--num-attention-heads", type=int, help="for SAT sources without rotary frequencies")
    add(
        "--rotary-angle-dtype",
        choices=ANGLE_DTYPES,
        help="what the weights were trained with, where the source does not say; SAT sources: fp16",
    )
    add(
        "--unified-multitask-encoding",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="position scheme that the weights were trained with, where the source does not say; "
        "SAT sources: unified, as GLM-130B from step 48,100 on",
    )
    add("--tokenizer-type", help="tokenizer to export, or to record; as in training")
    add("--tokenizer-model", type=Path, help="its file")
    add("--text-scheme", help="text scheme of an IceTokenizer")
    return parser.parse_args(arguments)


def open_source(args: argparse.Namespace) -> Source:
    if args.source == Format.MEGATRON.value:
        import patches

        patches.apply()
    return open_checkpoint(args.load, Format(args.source), args.num_attention_heads, args.ckpt_step)


def result_settings(
    args: argparse.Namespace, source: Source, tokenizer: Tokenizer | None
) -> Settings:
    """The source's settings, completed by flags; a tokenizer must be the one of the source."""
    if tokenizer is not None:
        check_tokenizer(source.settings, tokenizer, args.load)
    return source.settings.with_overrides(
        rotary_angle_dtype=args.rotary_angle_dtype,
        unified_multitask_encoding=args.unified_multitask_encoding,
        tokenizer_fingerprint=tokenizer and tokenizer.fingerprint,
    )


def load_tokenizer(
    args: argparse.Namespace, source: Source
) -> tuple[ExportedTokenizer | None, Tokenizer | None]:
    """What an export needs of --tokenizer-model, and the tokenizer; without the flag, what a source
    carries to a target of its kind."""
    if (args.tokenizer_type is None) != (args.tokenizer_model is None):
        raise CheckpointError(
            f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}: "
            "give both or neither"
        )
    if args.tokenizer_model is None:
        if args.source == args.target == Format.HUGGING_FACE.value:
            return read_tokenizer(args.load, source.settings.dimensions.vocab_size), None
        return None, None
    from megatron_glm.data.codecs import build_codec

    codec = build_codec(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    return export_tokenizer(codec), codec


def convert(args: argparse.Namespace) -> None:
    """Runs one conversion from beginning to end."""
    if args.load.resolve().is_relative_to(args.save.resolve()):
        raise CheckpointError(
            f"--save {args.save}: holds --load {args.load}, which would be lost; give another "
            "folder"
        )
    if args.overwrite and holds_something(args.save) and not is_conversion(args.save):
        raise CheckpointError(
            f"--save {args.save}: holds more than a conversion wrote, perhaps a training run, and "
            "--overwrite would delete it; give another folder, or delete this one yourself"
        )
    source = open_source(args)
    exported, tokenizer = load_tokenizer(args, source)
    settings = result_settings(args, source, tokenizer)
    request = Request(
        Format(args.target), args.target_tp, args.quantization_bit_width,
        args.quantization_group_size, DTYPES.get(args.dtype), args.iteration,
    )  # fmt: skip
    target = plan_target(request, source, settings, exported)
    warn(args, source, settings, exported)
    conversion = Conversion(source, target.dtype, target.bits, target.scales)
    everything = list(tensors(settings.dimensions))
    total = sum(map(conversion.source_bytes, everything))
    announced = resident_bytes() + conversion.peak_bytes() + WORKING_BYTES
    print(
        f"{len(everything)} tensors, {total / 1e9:.3f} GB to read, {target.num_bytes / 1e9:.3f} GB "
        f"to write\npeak memory: at most {announced / 1e9:.3f} GB, of which "
        f"{conversion.peak_bytes() / 1e9:.3f} GB for the tensors in hand",
        flush=True,
    )
    with (
        staged_directory(args.save, target.num_bytes, args.overwrite) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc=args.target) as bar,
    ):
        conversion.progress = bar.update
        target.write(folder, conversion)
        conversion.finish()
        described = {
            "format": args.source,
            "path": str(args.load),
            "iteration": source.iteration,
            "dtype": str(source.dtype).removeprefix("torch."),
            "quantization_bit_width": source.bits,
        }
        write_record(folder, described, target.description, settings, conversion.hashes)
    print(f"peak memory: {resident_bytes() / 1e9:.3f} GB\n{args.save}: whole", flush=True)


def warn(
    args: argparse.Namespace,
    source: Source,
    settings: Settings,
    tokenizer: ExportedTokenizer | None,
) -> None:
    """Says what the result will not do, though it is what was asked for."""
    notes = []
    if args.target == Format.SAT.value and settings.rotary_angle_dtype == "fp32":
        notes.append(
            "the weights were trained with fp32 rotary angles; SAT computes them in fp16, so its "
            "outputs differ. FasterTransformer computes them in fp32"
        )
    if args.target == Format.HUGGING_FACE.value and tokenizer is None:
        notes.append(
            "no --tokenizer-model: the export has no tokenizer and cannot generate, only score"
        )
    if args.rotary_angle_dtype not in (None, source.settings.rotary_angle_dtype):
        notes.append(
            f"--rotary-angle-dtype {args.rotary_angle_dtype} replaces the source's "
            f"{source.settings.rotary_angle_dtype}"
        )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with exit_with_one_line(after_interrupt=f"{args.save} is as it was"):
        convert(args)


if __name__ == "__main__":
    main()
