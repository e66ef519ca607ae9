"""GLM's flags beside Megatron's: registration, defaults, and the rules across flags.

A flag is a field of a dataclass; its docstring is the help text. Megatron's own flags keep their
meaning, get GLM-130B's values as defaults (paper, table 11), and are refused where they would
train something else in silence.
"""

import argparse
import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_glm.data.config import GLMDataArguments, default_max_samples
from megatron_glm.data.tokenizer import TEXT_SCHEMES, TOKENIZER_TYPES
from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import BACKENDS
from megatron_glm.model.config import GLMArchitecture
from megatron_glm.presets import PRESETS


class FlagError(GLMError):
    """A flag, or a pair of flags, that GLM cannot honour."""


@dataclass
class GLMRunArguments:
    """How a GLM run is set up."""

    glm_preset: str | None = field(
        default=None, metadata={"argparse_meta": {"choices": sorted(PRESETS)}}
    )
    """A published size: number of layers, hidden, FFN and head sizes, sequence length. Every field
    of it is overridden by its own flag."""

    text_scheme: str | None = field(
        default=None, metadata={"argparse_meta": {"choices": TEXT_SCHEMES}}
    )
    """How an IceTokenizer treats white space; must be the scheme that the data was made with."""

    mask_conformance_check: bool = field(
        default=True,
        metadata={"argparse_meta": {"arg_names": ["--mask-conformance-check"],
                                    "action": argparse.BooleanOptionalAction}},
    )
    """Perturb tokens on the real attention backend at start, and refuse to train where one that
    must be visible is not, or one that must be hidden is seen. Takes under a second."""


DEFAULTS: dict[str, Any] = {
    # The architecture, as Megatron names it.
    "position_embedding_type": "none",
    "transformer_impl": "local",
    "init_method_std": 0.0052,
    "attention_softmax_in_fp32": True,
    "max_position_embeddings": 2048,
    # What needs Apex or Transformer Engine, or computes another function.
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "bias_gelu_fusion": False,
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    # Without it the micro-batch size would weigh the tokens.
    "calculate_per_token_loss": True,
    # Nothing of size s x s is ever made.
    "create_attention_mask_in_dataloader": False,
    # Training as in table 11.
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "lr_decay_style": "cosine",
    # Table 11 has 65536, for the mean over a micro-batch. Here the loss is summed over the targets
    # until the end of the step, so the scale is that of a single one: 65536 over the some 1200
    # targets of a sequence, and over 1 to 176 micro-batches, corresponds to 55 down to 0.3.
    "initial_loss_scale": 64,
    "min_loss_scale": 2.0**-16,
    "loss_scale_window": 2000,
    "short_seq_prob": 0.02,
    "split": "949,50,1",
    "eval_interval": 1000,
    # Every 500 steps was found too sparse when a loss explosion had to be gone back behind.
    "save_interval": 250,
    "dataloader_type": "single",
}


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
_LOCAL_ONLY = "not supported by the local implementation; drop the flag"
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
    Rule("qk_clip", "--qk-clip", (False,), _LOCAL_ONLY),
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
    Rule("transformer_impl", "--transformer-impl", ("local",),
         "only Megatron's own linears are supported yet; leave it at local"),
    Rule("context_parallel_size", "--context-parallel-size", (1,),
         "context parallelism is not supported yet: it assumes a causal mask; use --tensor-model-"
         "parallel-size with --sequence-parallel for long sequences"),
    Rule("cross_entropy_loss_fusion", "--cross-entropy-loss-fusion", (False,),
         "it rounds the gradients of the logits to bf16 even in fp32; drop the flag"),
    Rule("cuda_graph_impl", "--cuda-graph-impl", ("none",),
         "Megatron's CUDA graphs make an s x s causal mask; drop the flag"),
    Rule("defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute", (False,),
         "it goes around the embedding gradient shrink; drop the flag"),
    Rule("use_megatron_fsdp", "--use-megatron-fsdp", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("use_torch_fsdp2", "--use-torch-fsdp2", (False,),
         "the embedding gradient shrink is not proven under FSDP; use --use-distributed-optimizer"),
    Rule("fp8", "--fp8-format", (None,), _LOCAL_ONLY),
    Rule("fp4", "--fp4-format", (None,), _LOCAL_ONLY),
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

RECOMPUTE_REFUSED = {
    "mlp": "Megatron recurses without end on an MLP with biases",
    "layernorm": "it frees the norm's output, which is GLM's residual",
}


def add_glm_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds GLM's flags and defaults to Megatron's parser, after Megatron's own."""
    megatrons = {action.dest: action for action in parser._actions}
    own = []
    for group, title in (
        (GLMRunArguments, "GLM run"),
        (GLMArchitecture, "GLM architecture"),
        (GLMDataArguments, "GLM data and objective"),
    ):
        # Megatron has some of GLM's names already (--mask-prob, --short-seq-prob).
        factory = ArgumentGroupFactory(group, exclude=sorted(megatrons))
        own += factory.build_group(parser, title)._group_actions
        for name in megatrons.keys() & factory.field_docstrings.keys():
            megatrons[name].help = factory.field_docstrings[name]
            own.append(megatrons[name])
    for action in own:
        if "default" not in action.help.lower():
            action.help += " Default: %(default)s."
    _extend_choices(parser)
    defaults = dict(DEFAULTS)
    if not torch.cuda.is_available():
        defaults["distributed_backend"] = "gloo"
    defaults |= PRESETS.get(_preset_name(parser), {})
    parser.set_defaults(**defaults)
    return parser


def check_flags(args: Namespace) -> None:
    """Raises FlagError, naming flag, value, rule and cure, where flags contradict GLM."""
    for rule in RULES:
        value = getattr(args, rule.dest, rule.allowed[0])
        if value not in rule.allowed:
            raise FlagError(f"{rule.flag} {_show(value)}: {rule.why}")
    for module in args.recompute_modules or ():
        if module in RECOMPUTE_REFUSED:
            raise FlagError(
                f"--recompute-modules {module}: {RECOMPUTE_REFUSED[module]}; use core_attn, or "
                "--recompute-granularity full"
            )
    if args.glm_attention_backend not in ("auto", *BACKENDS):
        raise FlagError(
            f"--glm-attention-backend {args.glm_attention_backend}: must be auto or one of "
            f"{', '.join(BACKENDS)}"
        )
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}")
        decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
        if decay and warmup and warmup >= decay:
            raise FlagError(
                f"--lr-warmup-{unit} {warmup}: must be smaller than the {decay} {unit} of the "
                f"schedule (--lr-decay-{unit}, or --train-{unit} where that is not given)"
            )
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


def check_tokenizer_flags(args: Namespace) -> None:
    """Raises FlagError where no tokenizer is given."""
    for flag in ("tokenizer_type", "tokenizer_model"):
        if getattr(args, flag) is None:
            raise FlagError(
                f"--{flag.replace('_', '-')} is missing: the same as was given to "
                "tools/preprocess_data.py"
            )


def fill_derived(args: Namespace) -> None:
    """Sets what follows from other flags and was not given, in `args` and in the environment."""
    # Tensor parallelism overlaps rightly only when kernels start in the order of their launch.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if args.seq_length and args.seq_length > args.max_position_embeddings:
        args.max_position_embeddings = args.seq_length
    if args.seq_length and args.max_samples_per_sequence is None:
        args.max_samples_per_sequence = default_max_samples(args.seq_length)


def pin_padded_vocab_size(args: Namespace, vocab_size: int) -> None:
    """Sets `args.padded_vocab_size`, independent of the tensor parallel size.

    Megatron multiplies --make-vocab-size-divisible-by by the tensor parallel size, so the shape of
    a checkpoint would change with it. FlagError where a given size cannot hold the tokenizer.
    """
    divisor, tp = args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    if args.padded_vocab_size is None:
        args.padded_vocab_size = -(-vocab_size // divisor) * divisor
    if args.padded_vocab_size < vocab_size:
        raise FlagError(
            f"--padded-vocab-size {args.padded_vocab_size}: smaller than the {vocab_size} tokens of "
            f"{args.tokenizer_model}; give another tokenizer or a larger size"
        )
    if args.padded_vocab_size % tp:
        raise FlagError(
            f"--padded-vocab-size {args.padded_vocab_size}: not divisible by --tensor-model-"
            f"parallel-size {tp}; set --make-vocab-size-divisible-by to a multiple of {tp}"
        )


def parse_glm_args(build_tokenizer: Callable[[Namespace], Any]) -> Namespace:
    """Parses, checks and publishes Megatron's and GLM's flags.

    build_tokenizer: called with the validated flags where Megatron would build its tokenizer;
    must set `args.padded_vocab_size` (see pin_padded_vocab_size).

    Exits with status 2 and one line on a flag that GLM refuses.
    """
    from megatron.training import global_vars
    from megatron.training.arguments import parse_args, validate_args

    args = parse_args(add_glm_arguments)
    with exit_with_one_line(args, AssertionError):
        check_flags(args)
        check_tokenizer_flags(args)
        fill_derived(args)
        validate_args(args)
        global_vars.build_tokenizer = build_tokenizer
        global_vars.set_global_variables(args)
    return args


@contextmanager
def exit_with_one_line(args: Namespace, *more: type[Exception]) -> Iterator[None]:
    """Turns an error that the user can cure into one line on rank 0 and exit status 2.

    more: exceptions beside GLMError, where Megatron says what is wrong with a flag by an assertion.
    """
    try:
        yield
    except (GLMError, FileNotFoundError, *more) as error:
        if args.rank == 0:
            # Some of Megatron's assertions say nothing; then the asserted line has to speak.
            message = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
            print(f"pretrain_glm.py: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error


def _extend_choices(parser: ArgumentParser) -> None:
    for action in parser._actions:
        if action.dest == "tokenizer_type":
            action.choices = list(TOKENIZER_TYPES)
            action.help = "Kind of tokenizer; must be the one that the data was made with."


def _preset_name(parser: ArgumentParser) -> str | None:
    """The preset has to be known before parsing: its values are defaults, which flags override."""
    action = next(a for a in parser._actions if a.dest == "glm_preset")
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--glm-preset", choices=action.choices)
    return early.parse_known_args()[0].glm_preset


def _show(value: Any) -> str:
    return "" if isinstance(value, bool) else str(value)
