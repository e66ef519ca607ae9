"""Certifies a GLM checkpoint: its logits against stored ones, or against another checkpoint's.

    python tools/verify_checkpoint.py --load glm-sat --cases cases.npz
    python tools/verify_checkpoint.py --load run --against run-hf

Each side is run by what serves its format: a Megatron checkpoint by Megatron's modules, a Hugging
Face one by its modelling code, a SAT one by a plain forward in this repository, all in fp32 on the
CPU. Prints a line a case; the exit status is 1 where a logit is off by more than --tolerance.
"""

import argparse
import filecmp
import sys
from importlib import resources
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import torch  # noqa: E402

from megatron_glm.checkpoint.convert import Source  # noqa: E402
from megatron_glm.checkpoint.errors import CheckpointError  # noqa: E402
from megatron_glm.checkpoint.formats import FORMATS, detect_format, open_checkpoint  # noqa: E402
from megatron_glm.checkpoint.quantization import QuantizedWeight  # noqa: E402
from megatron_glm.checkpoint.reference import prefix_mask  # noqa: E402
from megatron_glm.checkpoint.settings import ANGLE_DTYPES  # noqa: E402
from megatron_glm.checkpoint.table import Format, find, tensors  # noqa: E402
from megatron_glm.checkpoint.verify import (  # noqa: E402
    Cases,
    compare,
    load_cases,
    random_cases,
    run_reference,
)
from megatron_glm.errors import exit_with_one_line  # noqa: E402


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, help="checkpoint to certify")
    add("--format", choices=FORMATS, help="of --load; default: found out")
    add("--cases", type=Path,
        help=".npz with tokens, position_ids and samples, and logits to compare with unless "
        "--against is given; default: random packs")
    add("--against", type=Path, help="another checkpoint of the same model")
    add("--against-format", choices=FORMATS, help="of --against; default: found out")
    add("--tolerance", type=float, default=1e-4, help="largest difference of a logit (1e-4)")
    add("--rotary-angle-dtype", choices=ANGLE_DTYPES,
        help="run with these angles; default: those that the checkpoint was trained with")
    add("--num-attention-heads", type=int, help="for SAT checkpoints without rotary frequencies")
    add("--ckpt-step", type=int, help="iteration of a Megatron --load; default: the latest")
    add("--reference", action="store_true",
        help="run both sides by the plain forward, a weight at a time: for checkpoints that do not "
        "fit into memory")
    add("--trust-remote-code", action="store_true",
        help="run modelling code in a Hugging Face folder though it is not this repository's")
    return parser.parse_args(arguments)


def logits_of(
    directory: Path, fmt: Format, cases: Cases, args: argparse.Namespace
) -> torch.Tensor:
    """Logits fp32 [case, s, v] of a checkpoint, by the code that serves its format."""
    source = open_checkpoint(directory, fmt, args.num_attention_heads, args.ckpt_step)
    if args.rotary_angle_dtype:
        source.settings = source.settings.with_overrides(rotary_angle_dtype=args.rotary_angle_dtype)
    vocab_size = source.settings.dimensions.vocab_size
    if cases.tokens.max() >= vocab_size or cases.tokens.min() < 0:
        raise CheckpointError(f"--cases: a token is outside the {vocab_size} of {directory}")
    if args.reference or fmt is Format.SAT:
        return run_reference(source, cases)
    if fmt is Format.HUGGING_FACE:
        return run_hugging_face(source, cases, args.trust_remote_code)
    return run_megatron(source, cases)


@torch.no_grad()
def run_hugging_face(source: Source, cases: Cases, trust_remote_code: bool) -> torch.Tensor:
    """Logits by transformers and the folder's own modelling code."""
    from transformers import AutoModelForCausalLM

    code = resources.files("megatron_glm.checkpoint.hugging_face_model")
    for name in ("configuration_megatron_glm.py", "modeling_megatron_glm.py"):
        theirs = source.directory / name
        with resources.as_file(code / name) as ours:
            same = theirs.is_file() and filecmp.cmp(ours, theirs, shallow=False)
        if not same and not trust_remote_code:
            raise CheckpointError(
                f"{theirs}: is not this repository's modelling code; read it, then give "
                "--trust-remote-code to run it, or --reference to leave it alone"
            )
    model = AutoModelForCausalLM.from_pretrained(
        source.directory, trust_remote_code=True, dtype=torch.float32, local_files_only=True,
        rotary_angle_dtype=source.settings.rotary_angle_dtype,
    ).eval()  # fmt: skip
    if source.bits:
        # A quantised weight is its products of codes and scales in fp16, the type of the scales:
        # here, as in SAT's kernels and wherever the export is run in its own type.
        model.hf_quantizer.compressor.decompress_model(model)
        for tensor in filter(lambda t: t.row.quantizable, tensors(source.settings.dimensions)):
            weight = model.get_parameter(tensor.name(Format.HUGGING_FACE))
            weight.copy_(weight.half())
    mask = prefix_mask(cases.samples, cases.tokens.shape[1])[:, None]
    return model(cases.tokens, mask, cases.position_ids).logits


@torch.no_grad()
def run_megatron(source: Source, cases: Cases) -> torch.Tensor:
    """Logits by Megatron's modules on this one process."""
    model = build_megatron(source, cases.tokens.shape[1])
    for name, parameter in model.named_parameters():
        value = source.read(find(Format.MEGATRON, name))
        if isinstance(value, QuantizedWeight):
            value = value.dequantize()
        parameter.copy_(value)
    ends = cases.samples[..., 0] + cases.samples[..., 2]
    ends = torch.where(cases.samples[..., 2] > 0, ends, cases.tokens.shape[1])
    bounds = torch.stack((cases.samples[..., 1], ends), dim=1).int()
    return model(cases.tokens, cases.position_ids, bounds)


def build_megatron(source: Source, seq_length: int) -> torch.nn.Module:
    """A GLMModel in fp32 of a checkpoint's sizes, in a group of one process."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_glm.model.config import GLMModelConfig, GLMTransformerConfig
    from megatron_glm.model.glm_model import GLMModelBuilder

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(0)
    d = source.settings.dimensions
    config = GLMTransformerConfig(
        num_layers=d.num_layers,
        hidden_size=d.hidden_size,
        ffn_hidden_size=d.ffn_hidden_size,
        num_attention_heads=d.num_attention_heads,
        rotary_angle_dtype=source.settings.rotary_angle_dtype,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        perform_initialization=False,
        # Megatron warns of its own default.
        cuda_graph_modules=[],
    )
    builder = GLMModelBuilder(
        GLMModelConfig(transformer=config, vocab_size=d.vocab_size, seq_length=seq_length)
    )
    return builder.build_model(ProcessGroupCollection.use_mpu_process_groups()).eval()


def verify(args: argparse.Namespace) -> bool:
    """Prints a line a case; True where all are within the tolerance."""
    fmt = Format(args.format) if args.format else detect_format(args.load)
    source = open_checkpoint(args.load, fmt, args.num_attention_heads, args.ckpt_step)
    angles = args.rotary_angle_dtype or source.settings.rotary_angle_dtype
    cases = load_cases(args.cases) if args.cases else random_cases(source.settings)
    if args.against is not None:
        other = Format(args.against_format) if args.against_format else detect_format(args.against)
        expected = logits_of(args.against, other, cases, args)
        print(f"{args.load} ({fmt.value}) against {args.against} ({other.value})")
    elif angles in cases.logits:
        expected = cases.logits[angles]
        print(f"{args.load} ({fmt.value}, {angles} rotary angles) against {args.cases}")
    else:
        raise CheckpointError(
            f"nothing to compare with: give --against, or --cases with logits for {angles} angles"
        )
    good = True
    print("case  largest difference  same next token  verdict")
    for case, found in enumerate(compare(cases, logits_of(args.load, fmt, cases, args), expected)):
        within = found.largest_difference <= args.tolerance
        good &= within
        print(f"{case:4}  {found.largest_difference:18.3e}  {found.agreement:15.2%}  "
              f"{'equal' if within else 'DIFFERENT'}")
    print(f"{'all cases are' if good else 'NOT all cases are'} within {args.tolerance:g}")
    if not good and args.against is not None:
        theirs = open_checkpoint(args.against, other, args.num_attention_heads, args.ckpt_step)
        if source.dtype != theirs.dtype:
            print(f"{args.load} holds {source.dtype} and {args.against} {theirs.dtype}: weights "
                  "that were rounded differ by that much; compare files of one type, or give "
                  "--tolerance")
    return good


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with exit_with_one_line():
        good = verify(args)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
