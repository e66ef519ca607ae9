"""Which flags GLM refuses, and with which cure: above all those that would train something else in
silence."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_glm.errors import FlagError, flag_of
from megatron_glm.flags.data_paths import check_data_files, check_data_paths
from megatron_glm.flags.fixed import RULES
from megatron_glm.model.attention.backends import BACKENDS
from megatron_glm.planning.batch_sizes import SMALLEST_BATCH, smallest_batch


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
           "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_init", "decoupled_lr",
           "decoupled_min_lr")),
    Range("must be at least 0 and less than 1", lambda value: 0 <= value < 1,
          ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2",
           "lr_warmup_fraction")),
)  # fmt: skip


class Need(NamedTuple):
    """A flag that does nothing, without a word, where another is not given."""

    dest: str
    other: str
    is_given: Callable[[Namespace], bool]


def _is_selective(args: Namespace) -> bool:
    return args.recompute_granularity == "selective" or args.recompute_activations


def _is_full(args: Namespace) -> bool:
    return args.recompute_granularity == "full"


def _is_wsd(args: Namespace) -> bool:
    return args.lr_decay_style == "WSD"


NEEDS: tuple[Need, ...] = (
    Need("recompute_modules", "--recompute-granularity selective", _is_selective),
    Need("recompute_method", "--recompute-granularity full", _is_full),
    Need("recompute_num_layers", "--recompute-granularity full", _is_full),
    Need("lr_wsd_decay_iters", "--lr-decay-style WSD", _is_wsd),
    Need("lr_wsd_decay_samples", "--lr-decay-style WSD", _is_wsd),
    Need("decrease_batch_size_if_needed", "--rampup-batch-size",
         lambda args: args.rampup_batch_size),
    Need("decoupled_min_lr", "--decoupled-lr", lambda args: args.decoupled_lr is not None),
    Need("grad_reduce_in_bf16", "--bf16", lambda args: args.bf16),
    Need("async_save", "--use-persistent-ckpt-worker",
         lambda args: args.use_persistent_ckpt_worker),
    Need("log_progress", "--save", lambda args: args.save),
    Need("manual_gc_interval", "--manual-gc", lambda args: args.manual_gc),
)

TOKENIZER = ("tokenizer_type", "tokenizer_model")
MODEL_SIZE = ("num_layers", "hidden_size", "num_attention_heads", "seq_length")
REQUIRED = {
    **dict.fromkeys(TOKENIZER, "the same as was given to tools/preprocess_data.py"),
    **dict.fromkeys(MODEL_SIZE, "give it, or a whole size by --glm-preset"),
    "micro_batch_size": "give the sequences that one forward pass takes",
}
"""Flags without a default, and what to give. Of most, Megatron asserts a variable in no words."""

READ_NVML = ("log_energy", "log_straggler", "log_device_memory_used")
"""Flags whose figures come from a GPU's sensors."""

RECOMPUTED = ("core_attn", "mlp")
RECOMPUTE_REFUSED = {"layernorm": "it frees the norm's output, which is GLM's residual"}


def check_flags(args: Namespace) -> None:
    """Raises FlagError, naming flag, value, rule and cure, where flags contradict GLM."""
    for rule in RULES:
        value = getattr(args, rule.dest, rule.allowed[0])
        if value not in rule.allowed:
            raise FlagError(f"{_show(rule.flag, value)}: {rule.why}")
    for rule, holds, dests in RANGES:
        for dest in dests:
            value = getattr(args, dest)
            if value is not None and not holds(value):
                raise FlagError(f"{flag_of(dest)} {value}: {rule}")
    for dest, other, is_given in NEEDS:
        value = getattr(args, dest)
        if value and not is_given(args):
            flag = _show(flag_of(dest), value)
            raise FlagError(f"{flag}: does nothing without {other}; add that or drop the flag")
    _check_rates(args)
    _check_sensors(args)
    _check_recomputation(args)
    _check_precision_aware_optimizer(args)
    if args.glm_attention_backend not in ("auto", *BACKENDS):
        raise FlagError(
            f"--glm-attention-backend {args.glm_attention_backend}: must be auto or one of "
            f"{', '.join(BACKENDS)}"
        )
    check_data_paths(args)
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
    if not args.bias_dropout_fusion and args.glm_fused_kernels:
        raise FlagError(
            "--no-bias-dropout-fusion: on a GPU bias, dropout and residual are one of GLM's own "
            "kernels; add --no-glm-fused-kernels or drop the flag"
        )
    if args.hidden_size and args.num_attention_heads and args.kv_channels is None:
        if args.hidden_size % (2 * args.num_attention_heads):
            raise FlagError(
                f"--hidden-size {args.hidden_size} with --num-attention-heads "
                f"{args.num_attention_heads}: the head dimension must be an even integer (rotary "
                "positions turn pairs)"
            )
    elif args.kv_channels is not None and args.kv_channels % 2:
        raise FlagError(
            f"--kv-channels {args.kv_channels}: must be even (rotary positions turn pairs)"
        )


def _check_sensors(args: Namespace) -> None:
    for dest in READ_NVML:
        if getattr(args, dest):
            try:
                import_module("pynvml")
            except ImportError as error:
                raise FlagError(
                    f"{flag_of(dest)}: pynvml reads the sensors, without which Megatron "
                    "logs 0 or ends at its first report; pip install nvidia-ml-py or drop the flag"
                ) from error


def _check_rates(args: Namespace) -> None:
    for dest in ("min_lr", "lr_warmup_init"):
        if args.lr is not None and getattr(args, dest) > args.lr:
            raise FlagError(
                f"{flag_of(dest)} {getattr(args, dest)}: must be at most --lr {args.lr}"
            )
    lowest = args.min_lr if args.decoupled_min_lr is None else args.decoupled_min_lr
    if args.decoupled_lr is not None and lowest > args.decoupled_lr:
        raise FlagError(
            f"--decoupled-lr {args.decoupled_lr}: must be at least {lowest}, to which it goes; "
            "give a smaller --decoupled-min-lr (--min-lr, where that is not given)"
        )


def _check_schedule(args: Namespace) -> None:
    if args.train_iters and args.train_samples:
        raise FlagError(
            f"--train-samples {args.train_samples} with --train-iters {args.train_iters}: give one"
        )
    for unit, other in (("iters", "samples"), ("samples", "iters")):
        for flag in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
            value = getattr(args, f"{flag}_{other}")
            if value and getattr(args, f"train_{unit}"):
                flag = flag_of(flag)
                raise FlagError(
                    f"{flag}-{other} {value} with --train-{unit}: a schedule counts in one unit; "
                    f"give {flag}-{unit}"
                )
        if getattr(args, f"train_{unit}") and _is_wsd(args):
            if not getattr(args, f"lr_wsd_decay_{unit}"):
                raise FlagError(
                    f"--lr-decay-style WSD: needs --lr-wsd-decay-{unit}, in which the rate falls"
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
        if module not in RECOMPUTED:
            why = RECOMPUTE_REFUSED.get(module, "GLM's layer has none")
            raise FlagError(
                f"--recompute-modules {module}: {why}; use {own} for norms, "
                f"{' or '.join(RECOMPUTED)}, or --recompute-granularity full"
            )
    if args.recompute_granularity == "full":
        if args.glm_recompute_norms_and_geglu:
            raise FlagError(
                f"{own} with --recompute-granularity full: that recomputes them with all the rest; "
                "drop either"
            )
        if args.recompute_method is None or not args.recompute_num_layers:
            raise FlagError(
                "--recompute-granularity full: needs --recompute-method uniform and "
                "--recompute-num-layers 1, or block and as many layers of a stage as shall be"
            )
    if not args.glm_recompute_norms_and_geglu:
        return
    if args.transformer_impl == "transformer_engine":
        raise FlagError(
            f"{own} with --transformer-impl transformer_engine: what its linears keep has never "
            "been replaced; drop either"
        )


def _check_precision_aware_optimizer(args: Namespace) -> None:
    if not args.use_precision_aware_optimizer:
        return
    if not args.use_distributed_optimizer:
        raise FlagError(
            "--use-precision-aware-optimizer: is part of --use-distributed-optimizer; add that, "
            "also for one data parallel rank"
        )
    if args.log_params_norm:
        raise FlagError(
            "--log-params-norm with --use-precision-aware-optimizer: Megatron would print 0, since "
            "it looks for whole main weights; drop either"
        )


def _check_batch_size(args: Namespace) -> None:
    models = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    whole = args.global_batch_size
    if args.micro_batch_size and whole and args.world_size % models == 0:
        if whole % (smallest := smallest_batch_of(args)):
            raise FlagError(
                f"--global-batch-size {whole}: must be divisible by {smallest}, {SMALLEST_BATCH}"
            )
    if not args.rampup_batch_size:
        check_first_step(args, whole)


def check_first_step(args: Namespace, size: int | None) -> None:
    """Raises FlagError where a run has fewer samples than the `size` of its first step (None where
    that is not given): it would end at once, as if all were done."""
    if args.train_samples and size and args.train_samples < size:
        raise FlagError(
            f"--train-samples {args.train_samples}: must be at least {size}, the first batch"
        )


def smallest_batch_of(args: Namespace) -> int:
    """Sequences of which every step of these flags must have a multiple."""
    pp = args.pipeline_model_parallel_size
    dp = args.world_size // (args.tensor_model_parallel_size * pp)
    return smallest_batch(args.micro_batch_size, dp, pp, _interleaves(args))


def _interleaves(args: Namespace) -> bool:
    """Whether a pipeline stage has several model chunks."""
    if layout := args.pipeline_model_parallel_layout:
        stages = PipelineParallelLayerLayout.get_num_stages_from_str(layout)
        return stages > args.pipeline_model_parallel_size
    return (
        args.num_layers_per_virtual_pipeline_stage is not None
        or (args.num_virtual_stages_per_pipeline_rank or 1) > 1
    )


def check_required(args: Namespace, dests: Iterable[str] = REQUIRED) -> None:
    """Raises FlagError where one of `dests`, keys of REQUIRED, is not given."""
    for dest in dests:
        if getattr(args, dest) is None:
            raise FlagError(f"{flag_of(dest)} is missing: {REQUIRED[dest]}")


def check_start(args: Namespace) -> None:
    """Raises FlagError where a run of these flags cannot start here: it lacks a flag, a file or a
    package, or the ranks are no whole number of models."""
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
    check_data_files(args)
    if args.async_save and args.async_strategy == "nvrx":
        try:
            import_module("nvidia_resiliency_ext")
        except ImportError as error:
            raise FlagError(
                "--async-save: --async-strategy nvrx needs a package, pip install "
                "nvidia-resiliency-ext; or give --async-strategy mcore, which needs none"
            ) from error
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.world_size % (tp * pp):
        raise FlagError(
            f"--tensor-model-parallel-size {tp} x --pipeline-model-parallel-size {pp}: must divide "
            f"the {args.world_size} ranks of the run; torchrun starts --nnodes x --nproc-per-node"
        )


def _show(flag: str, value: Any) -> str:
    return flag if isinstance(value, bool) else f"{flag} {value}"
