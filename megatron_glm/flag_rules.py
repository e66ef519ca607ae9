"""Which flags GLM refuses, and with which cure: above all those that would train something else in
silence."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, NamedTuple

import torch

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import BACKENDS


class FlagError(GLMError):
    """A flag, or a pair of flags, that GLM cannot honour."""

    is_everywhere = True


class Rule(NamedTuple):
    """A Megatron flag that may have one value only under GLM."""

    dest: str
    flag: str
    allowed: tuple
    why: str


_ONE_ACTIVATION = "the MLP is GeGLU with the exact GELU; drop the flag (--glu-activation geglu)"
_ONE_POSITION = "positions are rotary by position id, over the whole head; drop the flag"
_ONE_NORM = "the norm is DeepNorm's LayerNorm with weight, bias and epsilon 1e-5; drop the flag"
_DENSE_ONLY = "GLM is a dense transformer with plain multi-head attention; drop the flag"
_FEW_BITS = "no GLM has been shown yet to train in 8 or 4 bits as well as in 16; drop the flag"
_UNTRIED = "its communication has never been tried with GLM's layer; drop the flag"
_OBJECTIVE = "the blank-infilling dataset does not read it; drop the flag"

RULES: tuple[Rule, ...] = (
    Rule("swiglu", "--swiglu", (False,), _ONE_ACTIVATION),
    Rule("quick_geglu", "--quick-geglu", (False,), _ONE_ACTIVATION),
    Rule("squared_relu", "--squared-relu", (False,), _ONE_ACTIVATION),
    Rule("openai_gelu", "--openai-gelu", (False,), _ONE_ACTIVATION),
    Rule("activation_func_clamp_value", "--activation-func-clamp-value", (None,), _ONE_ACTIVATION),
    Rule("glu_linear_offset", "--glu-linear-offset", (0.0,), _ONE_ACTIVATION),
    Rule("use_te_activation_func", "--use-te-activation-func", (False,), _ONE_ACTIVATION),
    Rule("position_embedding_type", "--position-embedding-type", ("none",),
         "GLM's rotary positions are its own, by position id; leave it at none"),
    Rule("use_rotary_position_embeddings", "--use-rotary-position-embeddings", (False,),
         _ONE_POSITION),
    Rule("rotary_interleaved", "--rotary-interleaved", (False,), _ONE_POSITION),
    Rule("rotary_percent", "--rotary-percent", (1.0,), _ONE_POSITION),
    Rule("use_rope_scaling", "--use-rope-scaling", (False,), _ONE_POSITION),
    Rule("rotary_seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor", (None,),
         _ONE_POSITION),
    Rule("no_rope_freq", "--no-rope-freq", (None,), _ONE_POSITION),
    Rule("normalization", "--normalization", ("LayerNorm",), _ONE_NORM),
    Rule("layernorm_epsilon", "--norm-epsilon", (1e-5,), _ONE_NORM),
    Rule("layernorm_zero_centered_gamma", "--apply-layernorm-1p", (False,), _ONE_NORM),
    Rule("fused_residual_rmsnorm", "--fused-residual-rmsnorm", (False,), _ONE_NORM),
    Rule("qk_layernorm", "--qk-layernorm", (False,), _ONE_NORM),
    Rule("qk_l2_norm", "--qk-l2-norm", (False,), _ONE_NORM),
    Rule("qk_clip", "--qk-clip", (False,), _DENSE_ONLY),
    Rule("fp32_residual_connection", "--fp32-residual-connection", (False,),
         "the residual is the output of the norm, in the norm's dtype; drop the flag"),
    Rule("add_bias_linear", "--disable-bias-linear", (True,),
         "every linear of GLM has a bias; drop the flag"),
    Rule("untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights", (False,),
         "GLM's logits use the word embedding; drop the flag"),
    Rule("init_method_xavier_uniform", "--init-method-xavier-uniform", (False,),
         "DeepNorm has its own initialisation; drop the flag"),
    Rule("use_mup", "--use-mup", (False,), "DeepNorm has its own initialisation; drop the flag"),
    Rule("group_query_attention", "--group-query-attention", (False,), _DENSE_ONLY),
    Rule("attention_output_gate", "--attention-output-gate", (False,), _DENSE_ONLY),
    Rule("softmax_type", "--softmax-type", ("vanilla",), _DENSE_ONLY),
    Rule("window_size", "--window-size", (None,), _DENSE_ONLY),
    Rule("multi_latent_attention", "--multi-latent-attention", (False,), _DENSE_ONLY),
    Rule("experimental_attention_variant", "--experimental-attention-variant", (None,),
         _DENSE_ONLY),
    Rule("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path", (None,),
         _DENSE_ONLY),
    Rule("num_experts", "--num-experts", (None,), _DENSE_ONLY),
    Rule("mtp_num_layers", "--mtp-num-layers", (None, 0), _DENSE_ONLY),
    Rule("hybrid_layer_pattern", "--hybrid-layer-pattern", (None,), _DENSE_ONLY),
    Rule("spec", "--spec", (None,), "the layer is GLM's; drop the flag"),
    Rule("transformer_impl", "--transformer-impl", ("local", "transformer_engine"),
         "a layer is made of Megatron's or Transformer Engine's linears; choose one of the two"),
    Rule("use_transformer_engine_op_fuser", "--use-transformer-engine-op-fuser", (False,),
         _ONE_ACTIVATION),
    Rule("tensor_parallel_num_weight_shards", "--tensor-parallel-num-weight-shards", (None,),
         "it cuts through heads, which DeepNorm's initialisation needs whole; use --tensor-model-"
         "parallel-size, and --use-distributed-optimizer for the optimizer's share"),
    Rule("tp_comm_overlap", "--tp-comm-overlap", (False,), _UNTRIED),
    Rule("symmetric_ar_type", "--symmetric-ar-type", (None,), _UNTRIED),
    Rule("delay_wgrad_compute", "--delay-wgrad-compute", (False,), _DENSE_ONLY),
    Rule("cpu_offloading_num_layers", "--cpu-offloading-num-layers", (0,),
         "it moves what Transformer Engine's own attention and norms keep, which GLM does not use; "
         "use --recompute-granularity"),
    Rule("context_parallel_size", "--context-parallel-size", (1,),
         "context parallelism is not supported yet: it assumes a causal mask; use --tensor-model-"
         "parallel-size with --sequence-parallel for long sequences"),
    Rule("cross_entropy_loss_fusion", "--cross-entropy-loss-fusion", (False,),
         "it rounds the gradients of the logits to bf16 even in fp32; drop the flag"),
    Rule("cuda_graph_impl", "--cuda-graph-impl", ("none",),
         "Megatron's CUDA graphs make an s x s causal mask; drop the flag"),
    Rule("fine_grained_activation_offloading", "--fine-grained-activation-offloading", (False,),
         "it cuts the layer between a residual connection and its norm, which are one; drop the "
         "flag, or use --recompute-granularity"),
    Rule("defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute", (False,),
         "it goes around the embedding gradient shrink; drop the flag"),
    Rule("use_megatron_fsdp", "--use-megatron-fsdp", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("use_torch_fsdp2", "--use-torch-fsdp2", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("fp8", "--fp8-format", (None,), _FEW_BITS),
    Rule("fp4", "--fp4-format", (None,), _FEW_BITS),
    Rule("te_precision_config_file", "--te-precision-config-file", (None,), _FEW_BITS),
    Rule("reset_position_ids", "--reset-position-ids", (False,), _OBJECTIVE),
    Rule("eod_mask_loss", "--eod-mask-loss", (False,), _OBJECTIVE),
    Rule("fim_data", "--fim-data", (False,), _OBJECTIVE),
    Rule("sft", "--sft", (False,), _OBJECTIVE),
    Rule("dataloader_inter_document_masking", "--dataloader-inter-document-masking", (False,),
         "keep documents apart with --reset-attention-mask"),
    Rule("mock_data", "--mock-data", (False,),
         "Megatron's mock samples have no blanks; make a small corpus with tools/gather_text.py"),
    Rule("per_dataset_sequences_path", "--per-dataset-sequences-path", (None,), _OBJECTIVE),
    Rule("iterations_to_skip", "--iterations-to-skip", ([],),
         "it knows the batches of GPT only; go back with --ckpt-step and another --seed instead"),
    Rule("yaml_cfg", "--yaml-cfg", (None,), "GLM's settings are flags; pass them as such"),
)



class Range(NamedTuple):
    """What numbers some of Megatron's flags may have, where Megatron does not say it in words."""

    rule: str
    holds: Callable[[float], bool]
    dests: tuple[str, ...]


RANGES: tuple[Range, ...] = (
    Range("must be 1 or more", lambda value: value >= 1,
          ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length",
           "micro_batch_size", "global_batch_size", "train_iters", "train_samples", "log_interval",
           "eval_interval", "save_interval", "seed")),
    Range("must be 0 or more", lambda value: value >= 0,
          ("lr", "min_lr", "weight_decay", "clip_grad", "eval_iters", "num_workers",
           "lr_warmup_iters", "lr_warmup_samples")),
    Range("must be at least 0 and less than 1", lambda value: 0 <= value < 1,
          ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2")),
)  # fmt: skip

TOKENIZER = ("tokenizer_type", "tokenizer_model")
MODEL_SIZE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
REQUIRED = {
    **dict.fromkeys(TOKENIZER, "the same as was given to tools/preprocess_data.py"),
    **dict.fromkeys(MODEL_SIZE, "give it, or a whole size by --glm-preset"),
    "micro_batch_size": "give the sequences that one forward pass takes",
}
"""Flags without a default, and what to give. Of most, Megatron asserts a variable in no words."""

RECOMPUTE_REFUSED = {"layernorm": "it frees the norm's output, which is GLM's residual"}


def check_flags(args: Namespace) -> None:
    """Raises FlagError, naming flag, value, rule and cure, where flags contradict GLM."""
    for rule in RULES:
        value = getattr(args, rule.dest, rule.allowed[0])
        if value not in rule.allowed:
            raise FlagError(f"{rule.flag} {_show(value)}: {rule.why}")
    for rule, holds, dests in RANGES:
        for dest in dests:
            value = getattr(args, dest)
            if value is not None and not holds(value):
                raise FlagError(f"--{dest.replace('_', '-')} {value}: {rule}")
    if args.lr is not None and args.min_lr > args.lr:
        raise FlagError(f"--min-lr {args.min_lr}: must be at most --lr {args.lr}")
    _check_recomputation(args)
    if args.use_precision_aware_optimizer:
        if not args.use_distributed_optimizer:
            raise FlagError(
                "--use-precision-aware-optimizer: is part of --use-distributed-optimizer; add "
                "that, also for one data parallel rank"
            )
        if args.log_params_norm:
            raise FlagError(
                "--log-params-norm with --use-precision-aware-optimizer: Megatron would print 0, "
                "since it looks for whole main weights; drop either"
            )
    if args.glm_attention_backend not in ("auto", *BACKENDS):
        raise FlagError(
            f"--glm-attention-backend {args.glm_attention_backend}: must be auto or one of "
            f"{', '.join(BACKENDS)}"
        )
    _check_data_paths(args)
    _check_batch_size(args)
    if args.fp16 and args.bf16:
        raise FlagError("--fp16 with --bf16: give one")
    if args.save_retain_interval and args.save_retain_interval % args.save_interval:
        raise FlagError(
            f"--save-retain-interval {args.save_retain_interval}: must be a multiple of "
            f"--save-interval {args.save_interval}"
        )
    _check_schedule(args)
    if args.use_cpu_initialization and torch.cuda.is_available():
        raise FlagError(
            "--use-cpu-initialization: Megatron leaves a model built so on the CPU; drop the flag"
        )
    if args.hidden_size and args.num_attention_heads and args.kv_channels is None:
        if args.hidden_size % (2 * args.num_attention_heads):
            raise FlagError(
                f"--hidden-size {args.hidden_size} with --num-attention-heads "
                f"{args.num_attention_heads}: the head dimension must be an even integer (rotary "
                "positions turn pairs)"
            )


def _check_schedule(args: Namespace) -> None:
    if args.train_iters and args.train_samples:
        raise FlagError(
            f"--train-samples {args.train_samples} with --train-iters {args.train_iters}: give one"
        )
    for unit, other in (("iters", "samples"), ("samples", "iters")):
        for flag in ("lr_decay", "lr_warmup"):
            value = getattr(args, f"{flag}_{other}")
            if value and getattr(args, f"train_{unit}"):
                flag = f"--{flag.replace('_', '-')}"
                raise FlagError(
                    f"{flag}-{other} {value} with --train-{unit}: a schedule counts in one unit; "
                    f"give {flag}-{unit}"
                )
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay and warmup and warmup >= decay:
            raise FlagError(
                f"--lr-warmup-{unit} {warmup}: must be smaller than the {decay} {unit} of the "
                f"schedule (--lr-decay-{unit}, or --train-{unit} where that is not given)"
            )


def _check_recomputation(args: Namespace) -> None:
    own = "--glm-recompute-norms-and-geglu"
    for module in args.recompute_modules or ():
        if module in RECOMPUTE_REFUSED:
            raise FlagError(
                f"--recompute-modules {module}: {RECOMPUTE_REFUSED[module]}; use {own} for norms, "
                "core_attn or mlp, or --recompute-granularity full"
            )
    if args.recompute_granularity == "full":
        if args.glm_recompute_norms_and_geglu:
            raise FlagError(
                f"{own} with --recompute-granularity full: that recomputes them with all the rest; "
                "drop either"
            )
        if args.recompute_method is None:
            raise FlagError(
                "--recompute-granularity full: needs --recompute-method uniform, or block with "
                "--recompute-num-layers for a part of the layers"
            )
    if not args.glm_recompute_norms_and_geglu:
        return
    if args.transformer_impl == "transformer_engine":
        raise FlagError(
            f"{own} with --transformer-impl transformer_engine: what its linears keep has never "
            "been replaced; drop either"
        )


def _check_data_paths(args: Namespace) -> None:
    split = [
        f"--{part}-data-path" for part in ("train", "valid", "test")
        if getattr(args, f"{part}_data_path")
    ]  # fmt: skip
    if args.data_path and split:
        raise FlagError(
            f"--data-path with {' '.join(split)}: give the first, which --split divides, or the "
            "others"
        )
    if not (args.data_path or args.train_data_path) and not args.skip_train and split:
        raise FlagError(
            f"{' '.join(split)} without --train-data-path: the run would train on nothing; give "
            "it, or --skip-train"
        )
    for part in ("data", "train_data", "valid_data", "test_data", "multitask_data"):
        _check_weights(f"--{part.replace('_', '-')}-path", getattr(args, f"{part}_path") or [])
    shares = [_number(share) for share in (args.split or "1").split(",")]
    if (
        len(shares) > 3
        or not all(share is not None and 0 <= share < inf for share in shares)
        or not (shares[0] or args.skip_train)
    ):
        raise FlagError(
            f"--split {args.split}: must be the shares of training, validation and test data, like "
            "949,50,1, the first above 0"
        )


def _check_weights(flag: str, items: list[str]) -> None:
    numbers = [_number(item) for item in items]
    weights, prefixes = numbers[::2], numbers[1::2]
    if any(number is not None for number in numbers) and not (
        len(weights) == len(prefixes)
        and all(weight is not None and 0 < weight < inf for weight in weights)
        and not any(number is not None for number in prefixes)
    ):
        raise FlagError(
            f"{flag} {' '.join(items)}: must be prefixes alone, or each behind its weight, above 0"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_batch_size(args: Namespace) -> None:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    micro, whole = args.micro_batch_size, args.global_batch_size
    if micro and whole and args.world_size % (tp * pp) == 0:
        dp = args.world_size // (tp * pp)
        if whole % (micro * dp):
            raise FlagError(
                f"--global-batch-size {whole}: must be divisible by --micro-batch-size {micro} x "
                f"{dp}, the number of data parallel ranks"
            )


def check_required(args: Namespace, dests: Iterable[str] = REQUIRED) -> None:
    """Raises FlagError where one of `dests`, keys of REQUIRED, is not given."""
    for dest in dests:
        if getattr(args, dest) is None:
            raise FlagError(f"--{dest.replace('_', '-')} is missing: {REQUIRED[dest]}")


def check_start(args: Namespace) -> None:
    """Raises FlagError where a run of these flags cannot start here: it lacks a flag, or the ranks
    are no whole number of models."""
    check_required(args)
    if not (args.train_iters or args.train_samples):
        raise FlagError("--train-iters is missing: give the steps of the run, or --train-samples")
    if args.lr is None and not args.skip_train:
        raise FlagError("--lr is missing: give the highest learning rate")
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        raise FlagError(
            f"--wandb-project {args.wandb_project}: needs --wandb-save-dir, or --save, into which "
            "it writes too"
        )
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * pp):
        raise FlagError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp}: must divide "
            f"the {args.world_size} ranks of the run; torchrun starts --nnodes x --nproc-per-node"
        )


def _show(value: Any) -> str:
    return "" if isinstance(value, bool) else str(value)
