"""Pre-trains a GLM by blank infilling on Megatron-Core; start it with torchrun.

    torchrun --nproc-per-node 1 pretrain_glm.py --glm-preset tiny --data-path PREFIX ...

README.md has whole commands; `python pretrain_glm.py --help` prints every flag.
"""

import os
from tempfile import gettempdir

# Tensor parallelism overlaps rightly only when kernels start in the order of their launch. CUDA
# reads it when it starts, as it does for the patches, which ask whether there is a GPU.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Where FlashAttention-4 is installed, Megatron imports it, and it reads these: it keeps the kernels
# that it compiles for the next start, by default in a folder of the user's name, for want of which
# in a container the import would fail.
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault(
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", f"{gettempdir()}/flash_attention_{os.getuid()}"
)

import patches  # noqa: E402

patches.apply()

from argparse import Namespace  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import cache, partial  # noqa: E402

import torch  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.parallel_state import (  # noqa: E402
    get_data_parallel_group,
    get_model_parallel_group,
    get_tensor_model_parallel_group,
    is_pipeline_first_stage,
)
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.core.utils import StragglerDetector, unwrap_model  # noqa: E402
from megatron.training import get_args, get_timers, pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.global_vars import get_tokenizer  # noqa: E402
from torch.distributed import ProcessGroup  # noqa: E402

from megatron_glm.data.builder import train_valid_test_datasets  # noqa: E402
from megatron_glm.data.config import dataset_config_from_args, objective_names  # noqa: E402
from megatron_glm.data.ledger import Ledger, ledger_lines  # noqa: E402
from megatron_glm.data.tokenizer import GLMTokenizer, build_tokenizer  # noqa: E402
from megatron_glm.errors import exit_with_one_line  # noqa: E402
from megatron_glm.flags.arguments import parse_glm_args, pin_padded_vocab_size  # noqa: E402
from megatron_glm.model.config import GLMModelConfig, GLMTransformerConfig  # noqa: E402
from megatron_glm.model.glm_model import (  # noqa: E402
    GLMModel,
    check_kernel_conformance,
    check_mask_conformance,
    choose_attention_backend,
)
from megatron_glm.training.accounting import count_as_glm  # noqa: E402
from megatron_glm.training.agreement import ReadData  # noqa: E402
from megatron_glm.training.batch import Batch, next_batch  # noqa: E402
from megatron_glm.training.divergence import check_steps  # noqa: E402
from megatron_glm.training.evaluation import (  # noqa: E402
    evaluate_only_data,
    num_validation_sequences,
)
from megatron_glm.training.hooks import (  # noqa: E402
    run_after_steps,
    run_before_saves,
    skip_warm_up,
)
from megatron_glm.training.loss import LossParts, token_loss  # noqa: E402
from megatron_glm.training.optimizer import (  # noqa: E402
    provide_fused_optimizer,
    uses_split_adam,
)
from megatron_glm.training.run_length import num_training_sequences  # noqa: E402
from megatron_glm.training.save_errors import put_save_errors_in_words  # noqa: E402
from megatron_glm.training.save_lock import saving_alone  # noqa: E402
from megatron_glm.training.settings import (  # noqa: E402
    check_checkpoints,
    current_settings,
    schedule_mismatch_in_words,
)
from megatron_glm.training.split_adam import check_split_adam  # noqa: E402

# Of --log-straggler. Megatron turns it on, and what is made once more turns it off.
straggler_detector = StragglerDetector()


def tokenizer_from_args(args: Namespace) -> GLMTokenizer:
    """Builds the tokenizer where Megatron would, and pins the vocabulary and the settings."""
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    pin_padded_vocab_size(args, tokenizer.vocab_size)
    args.tokenizer_fingerprint = tokenizer.fingerprint
    # Megatron stores its arguments with every checkpoint, and these with them.
    args.glm_settings = current_settings(args)
    check_checkpoints(args)
    return tokenizer


def model_config_from_args(args: Namespace) -> GLMModelConfig:
    transformer = core_transformer_config_from_args(args, config_class=GLMTransformerConfig)
    config = gpt_config_from_args(args, transformer, GLMModelConfig)
    choose = partial(
        choose_attention_backend,
        checks_mask=args.mask_conformance_check, checks_kernel=args.kernel_conformance_check,
    )  # fmt: skip
    hooks = {
        choose: True,
        check_mask_conformance: args.mask_conformance_check,
        check_kernel_conformance: args.kernel_conformance_check,
        check_split_adam: args.kernel_conformance_check and uses_split_adam(args),
    }
    config.post_wrap_hooks += [
        partial(
            hook,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            max_samples=args.max_samples_per_sequence,
        )
        for hook, is_asked in hooks.items()
        if is_asked
    ]
    return config


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Train, validation and test datasets, on every rank and for every virtual stage."""
    args = get_args()
    with exit_with_one_line(rank=args.rank, local_rank=args.local_rank):
        train = num_training_sequences(args)
        datasets = train_valid_test_datasets(
            dataset_config_from_args(args, get_tokenizer()),
            [train, num_validation_sequences(args), num_samples[2]],
        )
    if datasets[0] is not None:
        args.mix_state = datasets[0].mix.state_dict()
    return datasets


# On every rank, not just on the first of each tensor parallel group.
datasets_provider.is_distributed = True


@cache
def loss_parts() -> LossParts:
    args = get_args()
    return LossParts(
        objective_names(args), args.train_sources, args.eval_sources, args.padded_vocab_size
    )


@cache
def ledger() -> Ledger:
    args = get_args()
    counts = Ledger(args.source_prefixes)
    counts.load_state_dict(getattr(args, "ledger_state", None) or {})
    return counts


def store_ledger() -> None:
    """Adds up what all data parallel ranks have read, prints it, and leaves it to the checkpoint.

    The first pipeline stage counts: rank 0, whose arguments Megatron stores, is in it.
    """
    if is_pipeline_first_stage(ignore_virtual=True):
        state = ledger().state_dict(get_data_parallel_group())
        get_args().ledger_state = state
        for line in ledger_lines(state):
            print_rank_0(f" ledger | {line}")


@cache
def read_data() -> ReadData:
    return ReadData()


def compare_read_data(group: ProcessGroup, iteration: int) -> None:
    read_data().compare(iteration, group, torch.cuda.current_device())


def loss_func(batch: Batch, training: bool, losses: torch.Tensor) -> tuple:
    """Sum, number of targets and report of a micro-batch, as Megatron's schedules take them."""
    losses = losses.float()
    loss, num_tokens = token_loss(losses, batch)
    # With --rerun-mode validate_results: Megatron runs a step that finds NaN again to tell why.
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss, rejection_func=is_bad, tolerance=0.0, fatal=True,
                message=f"found {name} in the loss of a micro-batch",
            )
    return loss, num_tokens, loss_parts()(losses.detach(), batch, training)


def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple:
    """Runs one micro-batch through this stage; returns its output and the loss function of it."""
    args, timers = get_args(), get_timers()
    glm: GLMModel = unwrap_model(model)
    glm.set_consumed_samples(args.consumed_train_samples)

    timers("batch-generator", log_level=2).start()
    with straggler_detector(bdata=True):
        batch = next_batch(
            data_iterator,
            micro_batch_size=args.micro_batch_size if glm.training else args.eval_micro_batch_size,
            seq_length=args.seq_length,
            num_samples=args.max_samples_per_sequence,
            device=next(glm.parameters()).device,
            read_data=read_data(),
        )
    if not read_data().is_compared:
        # Before the first collective of tensor parallel ranks whose size follows the data.
        compare_read_data(get_tensor_model_parallel_group(), args.iteration + 1)
    timers("batch-generator").stop()
    if glm.training and glm.pre_process:
        ledger().add(batch.objectives, batch.sources, batch.sample_ends, batch.loss_mask)

    with straggler_detector:
        losses = model(
            batch.tokens, batch.position_ids, batch.samples, labels=batch.labels,
            target_rows=batch.target_rows if glm.post_process else None,
        )  # fmt: skip
    return losses, partial(loss_func, batch, glm.training)


def main() -> None:
    args = parse_glm_args(tokenizer_from_args)
    with exit_with_one_line(rank=args.rank, local_rank=args.local_rank):
        model_config = model_config_from_args(args)
    if args.rank == 0:
        print(f"patches applied: {', '.join(patches.apply())}", flush=True)
    provide_fused_optimizer()
    count_as_glm()
    skip_warm_up()
    evaluate_only_data()
    check_steps(args)
    run_after_steps(lambda step, *_: compare_read_data(get_model_parallel_group(), step))
    run_before_saves(store_ledger)
    put_save_errors_in_words(args.save)
    resumes = args.save is not None and args.load == args.save
    hint = "the same command goes on from the last whole checkpoint" if resumes else ""
    with (
        exit_with_one_line(rank=args.rank, after_interrupt=hint),
        saving_alone(args.save, args.rank),
        schedule_mismatch_in_words(args.load),
    ):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            datasets_provider,
            ModelType.encoder_or_decoder,
            forward_step,
        )


if __name__ == "__main__":
    main()
