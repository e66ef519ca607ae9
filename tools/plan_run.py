"""Says what a training command will take on a cluster: memory, bubble, step time, days.

    python tools/plan_run.py --gpu H200 --nodes 96 <the flags of pretrain_glm.py>
    python tools/plan_run.py --gpu A100-80G --nodes 4 --search --global-batch-size 1024 <flags>

Needs no GPU. The second form finds the fastest layouts that fit, whatever layout the flags have.
Memory follows Megatron's own code to within some MiB; time is operations and bytes by published
and measured rates, all of which can be replaced by what you have measured.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import warnings  # noqa: E402
from dataclasses import fields  # noqa: E402

from megatron.training.arguments import parse_args, validate_args  # noqa: E402

from megatron_glm.data.tokenizer import build_tokenizer  # noqa: E402
from megatron_glm.errors import exit_with_one_line  # noqa: E402
from megatron_glm.flags.arguments import (  # noqa: E402
    add_glm_arguments,
    fill_derived,
    pin_padded_vocab_size,
)
from megatron_glm.flags.rules import MODEL_SIZE, check_flags, check_required  # noqa: E402
from megatron_glm.pictures import check_picture  # noqa: E402
from megatron_glm.planning import report  # noqa: E402
from megatron_glm.planning.cluster import Cluster, Efficiency, find_gpu  # noqa: E402
from megatron_glm.planning.job import PlanError, job_from_args  # noqa: E402
from megatron_glm.planning.memory import GIB, Overheads  # noqa: E402
from megatron_glm.planning.operations import Objective, shares  # noqa: E402
from megatron_glm.planning.plan import Plan, Run  # noqa: E402
from megatron_glm.planning.search import best_plans  # noqa: E402

# What a search chooses itself.
SEARCHED = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "micro_batch_size": 1,
    "num_virtual_stages_per_pipeline_rank": None, "num_layers_per_virtual_pipeline_stage": None,
    "decoder_first_pipeline_num_layers": None, "decoder_last_pipeline_num_layers": None,
    "account_for_embedding_in_pipeline_split": False, "account_for_loss_in_pipeline_split": False,
    "recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None,
    "sequence_parallel": False, "distribute_saved_activations": False,
    "glm_recompute_norms_and_geglu": False,
}  # fmt: skip


def own_parser() -> argparse.ArgumentParser:
    """The flags beside those of pretrain_glm.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="All other flags are those of pretrain_glm.py.",
    )  # fmt: skip
    add = parser.add_argument
    add("--gpu", default="H200", help="A100-40G, A100-80G, H100, H200 (default) or B200")
    add("--nodes", type=int, default=1, help="nodes of the cluster; default 1")
    add("--gpus-per-node", type=int, default=8, help="default 8")
    add("--search", action="store_true", help="find the fastest layouts that fit")
    add("--train-tokens", type=float, help="tokens to train on, instead of --train-samples")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    add("--plot", type=Path, metavar="FILE", help="draw memory by stage and time by kind")
    measured = parser.add_argument_group("what you have measured, instead of the defaults")
    add = measured.add_argument
    add("--product-tflops", type=float, help="of large bf16 products of this model's shapes")
    add("--attention-share", type=float, help="of the peak, forward and backward, mask's own work")
    add("--memory-tb-s", type=float, help="that a copy reads and writes")
    add("--nvlink-gb-s", type=float, help="one way, in collectives inside a node")
    add("--network-gb-s", type=float, help="one way, in collectives between nodes, of a GPU")
    add("--gpu-memory-gib", type=float, help="that a process can use")
    add("--cuda-context-gib", type=float, help="of a process before its first tensor")
    add("--nccl-gib", type=float, help="of all communicators of a rank")
    add("--fragmentation", type=float, help="share that the allocator reserves beyond tensors")
    return parser


def cluster_from(own: argparse.Namespace) -> Cluster:
    """The cluster of the flags; what was measured is taken as it is."""
    if own.nodes < 1 or own.gpus_per_node < 1:
        raise PlanError(f"--nodes {own.nodes} x --gpus-per-node {own.gpus_per_node}: must be 1 "
                        "or more")
    usual = Efficiency()

    def rate(value: float | None, unit: float, share: float) -> float | None:
        return None if value is None else value * unit / share

    gpu = find_gpu(
        own.gpu,
        best_product=rate(own.product_tflops, 1e12, usual.product),
        memory_bandwidth=rate(own.memory_tb_s, 1e12, usual.memory),
        nvlink=rate(own.nvlink_gb_s, 1e9, usual.link),
        network=rate(own.network_gb_s, 1e9, usual.link),
        memory=rate(own.gpu_memory_gib, GIB, 1.0),
    )
    share = usual.attention if own.attention_share is None else own.attention_share
    return Cluster(gpu, own.nodes, own.gpus_per_node, Efficiency(attention=share))


def overheads_from(own: argparse.Namespace) -> Overheads:
    """The overheads of the flags."""
    given = {
        "cuda_context": None if own.cuda_context_gib is None else int(own.cuda_context_gib * GIB),
        "nccl": None if own.nccl_gib is None else int(own.nccl_gib * GIB),
        "fragmentation": own.fragmentation,
    }
    return Overheads(**{name: value for name, value in given.items() if value is not None})


def training_args(own: argparse.Namespace, rest: list[str]) -> argparse.Namespace:
    """Megatron's and GLM's flags, checked as in training."""
    sys.argv[1:] = rest
    # One rank starts whatever the batch is; the search sees to the rest.
    world_size = 1 if own.search else own.nodes * own.gpus_per_node
    os.environ |= {"WORLD_SIZE": str(world_size), "RANK": "0"}
    args = parse_args(add_glm_arguments)
    check_required(args, MODEL_SIZE)
    check_flags(args)
    fill_derived(args)
    if own.search:
        if args.global_batch_size is None:
            raise PlanError("--global-batch-size is missing: a search needs it; give the sequences "
                            "of a step")
        args.__dict__.update(SEARCHED)
    args.micro_batch_size = args.micro_batch_size or 1
    # Megatron prints every flag with its value, and warns of what training alone is about.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        validate_args(args)
    pin_padded_vocab_size(args, vocabulary_of(args))
    return args


def vocabulary_of(args: argparse.Namespace) -> int:
    """Tokens of the tokenizer that the flags name, or as many as they say."""
    if args.tokenizer_type and args.tokenizer_model:
        tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
        return tokenizer.vocab_size
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise PlanError(
            "--padded-vocab-size is missing: give it, or --tokenizer-type and --tokenizer-model"
        )
    return args.vocab_size or 1


def run_from(own: argparse.Namespace, args: argparse.Namespace) -> Run:
    """How long the run is, and what its samples leave of the work."""
    samples = args.train_samples
    if own.train_tokens:
        samples = round(own.train_tokens / args.seq_length)
    elif args.train_iters and not samples:
        samples = args.train_iters * args.global_batch_size
    objective = Objective(**{item.name: getattr(args, item.name) for item in fields(Objective)})
    ramp = args.rampup_batch_size
    return Run(samples, tuple(ramp) if ramp else None, shares(objective))


def print_plan(plan: Plan) -> None:
    """Headline, tables, warnings."""
    print("\n".join([*report.headline(plan), "", *report.memory_table(plan), "",
                     *report.time_table(plan)]))  # fmt: skip
    for warning in plan.warnings:
        print(f"\nwarning: {warning}")


def print_search(plans: list[Plan]) -> None:
    """The best first, then all of them, then its flags."""
    print("\n".join([*report.headline(plans[0]), "", *report.plans_table(plans), ""]))
    print("\n".join(["flags of the first:", "  " + " ".join(report.flags(plans[0]))]))
    for warning in plans[0].warnings:
        print(f"\nwarning: {warning}")


def main() -> None:
    own, rest = own_parser().parse_known_args()
    # Megatron says by assertions what is wrong with a flag.
    with exit_with_one_line(AssertionError):
        check_picture("--plot", own.plot)
        cluster, overheads = cluster_from(own), overheads_from(own)
        args = training_args(own, rest)
        job, run = job_from_args(args), run_from(own, args)
        if own.search:
            plans = best_plans(job, cluster, run, overheads)
            print_search(plans)
        else:
            plans = [Plan(job, cluster, run, overheads)]
            print_plan(plans[0])
        if own.json:
            own.json.write_text(json.dumps([report.as_json(plan) for plan in plans], indent=1))
        if own.plot:
            from megatron_glm.planning.plot import draw

            draw(plans[0], own.plot)


if __name__ == "__main__":
    main()
