"""Builds every pipeline stage of a training command without data, weights or GPUs.

    python tools/dry_run.py --world-size 768 <the flags of pretrain_glm.py>

The modules are those of the real run at their real size, on the meta device and in a process group
that only pretends; what is printed is what each stage holds. Flags are checked as in training.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import argparse  # noqa: E402

import torch  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    gpt_config_from_args,
)
from megatron.training.arguments import parse_args, validate_args  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from megatron_glm.errors import exit_with_one_line  # noqa: E402
from megatron_glm.flags.arguments import (  # noqa: E402
    add_glm_arguments,
    fill_derived,
    pin_padded_vocab_size,
)
from megatron_glm.flags.rules import MODEL_SIZE, check_flags, check_required  # noqa: E402
from megatron_glm.model.config import GLMModelConfig, GLMTransformerConfig  # noqa: E402
from megatron_glm.model.glm_model import GLMModelBuilder  # noqa: E402


def stage_parameters(args: argparse.Namespace, pp_rank: int) -> dict[str, int]:
    """Parameters of one tensor parallel rank of a stage: name in the stage -> number, and layers.

    Takes the place of the first data parallel rank of that stage in the whole job.
    """
    tp, pp, world_size = (
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.world_size,
    )
    rank = pp_rank * (world_size // pp)
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=world_size
    )
    parallel_state.initialize_model_parallel(
        tp, pp, args.virtual_pipeline_model_parallel_size, create_gloo_process_groups=False
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    transformer = core_transformer_config_from_args(args, config_class=GLMTransformerConfig)
    transformer.perform_initialization = False
    builder = GLMModelBuilder(gpt_config_from_args(args, transformer, GLMModelConfig))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    vp = args.virtual_pipeline_model_parallel_size
    counts = {"layers": 0, "sharded": 0, "replicated": 0, "tied": 0}
    for stage in [None] if vp is None else range(vp):
        model = builder.build_model(groups, vp_stage=stage)
        counts["layers"] += len(model.decoder.layers)
        for name, parameter in model.named_parameters():
            is_sharded = getattr(parameter, "tensor_model_parallel", False)
            kind = "sharded" if is_sharded else "replicated"
            # The last stage has a copy of the word embedding for the logits.
            kind = "tied" if name == "output_layer.weight" else kind
            counts[kind] += parameter.numel()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return counts


def main() -> None:
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    own.add_argument("--world-size", type=int, default=1, help="GPUs of the whole job; default 1")
    known, rest = own.parse_known_args()
    sys.argv[1:] = rest
    os.environ |= {"WORLD_SIZE": str(known.world_size), "RANK": "0"}
    args = parse_args(add_glm_arguments)
    # Megatron prints every flag with its value.
    with exit_with_one_line(AssertionError), contextlib.redirect_stdout(io.StringIO()):
        check_required(args, (*MODEL_SIZE, "micro_batch_size"))
        check_flags(args)
        fill_derived(args)
        validate_args(args)
        pin_padded_vocab_size(args, args.vocab_size or 1)
    # Transformer Engine's linears have the same shapes, and need a GPU to be made.
    args.transformer_impl = "local"
    torch.cuda.current_device = lambda: torch.device("meta")

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    print(f"{args.world_size} ranks: TP {tp} x PP {pp} x DP {args.data_parallel_size}")
    print(f"{'stage':>5} {'layers':>6} {'parameters':>18} {'on one rank':>16}")
    total = 0
    for pp_rank in range(pp):
        counts = stage_parameters(args, pp_rank)
        whole = counts["sharded"] * tp + counts["replicated"]
        one_rank = counts["sharded"] + counts["replicated"] + counts["tied"]
        print(f"{pp_rank:>5} {counts['layers']:>6} {whole:>18,} {one_rank:>16,}", flush=True)
        total += whole
    print(f"{total:,} parameters in all ({total / 1e9:.1f}B)")


if __name__ == "__main__":
    main()
