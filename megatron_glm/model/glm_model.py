"""GLMModel and its builder: all that touches Megatron's GPTModel.

GPTModel is announced as deprecated upstream, so every contact with it stands in this file.
"""

import logging

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerLayer
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder
from torch import Tensor

from megatron_glm.model.attention.conformance import AttentionSetup, check_backend
from megatron_glm.model.embedding import GradientShrink, shrink_alpha
from megatron_glm.model.fused.selection import DEVICES, uses_kernels
from megatron_glm.model.layer_spec import glm_block_spec
from megatron_glm.model.rotary import RotaryTable
from megatron_glm.model.target_rows import select_rows, spread_rows
from megatron_glm.model.weight_gradient import provide_weight_gradient_kernels

# It tells users of GPTModel to move to another class, at every start and on every stage.
logging.getLogger(GPTModel.__module__).setLevel(logging.ERROR)


class GLMModel(GPTModel):
    """One pipeline stage of a GLM.

    `forward(input_ids, position_ids, attention_mask, labels=None, target_rows=None)` is GPTModel's,
    with input_ids, position_ids, labels [b, s] int64 and, in the place of a mask, `attention_mask`
    = the samples of each sequence, [b, 2, k] int32: row 0 their context lengths, row 1 their ends
    (see megatron_glm/model/attention/bounds.py). Returns per-token losses [b, s] or, without
    labels, logits [b, s, v / tp]; hidden states [s, b, h] on a stage that is not the last.
    `target_rows` [n] int64: the rows of [s * b, h] whose losses are wanted, the others being 0
    (see megatron_glm/model/target_rows.py).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rotary_table = RotaryTable(
            self.max_sequence_length,
            self.config.kv_channels,
            self.rotary_base,
            self.config.rotary_angle_dtype,
        )
        self.gradient_shrink = None
        if self.pre_process or self.post_process:
            # A fused weight gradient goes around autograd and so around the shrink.
            if self.post_process:
                self.output_layer.gradient_accumulation_fusion = False
                if self.output_layer.sequence_parallel:
                    # Hidden states are gathered before, so that targets can be selected.
                    self.output_layer.sequence_parallel = False
                    self.output_layer.allreduce_dgrad = True
            self.gradient_shrink = GradientShrink(
                self.shared_embedding_or_output_weight(), shrink_alpha(self.config, 0)
            )

    def set_consumed_samples(self, consumed_samples: int) -> None:
        """Moves what is scheduled in samples: the embedding gradient shrink."""
        if self.gradient_shrink is not None:
            self.gradient_shrink.alpha = shrink_alpha(self.config, consumed_samples)

    def forward(self, *args, target_rows: Tensor | None = None, **kwargs) -> Tensor:
        if target_rows is not None:
            kwargs |= {
                "output_processor": self._losses_of_targets,
                "output_processor_context": target_rows,
            }
        return super().forward(*args, **kwargs)

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        decoder_input, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        # Full length under sequence parallelism too: queries and keys are gathered before they
        # are rotated.
        return decoder_input, self.rotary_table(position_ids), *rest

    def _postprocess(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if self.post_process and self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return super()._postprocess(hidden_states, *args, **kwargs)

    def _losses_of_targets(
        self, *, hidden_states: Tensor, output_layer, output_weight, labels, context, **_
    ) -> Tensor:
        """Losses [b, s] of hidden states [s, b, h], 0 in rows other than context = target_rows."""
        rows = select_rows(hidden_states.flatten(0, 1), context)
        logits, _ = output_layer(rows[:, None], weight=output_weight)
        row_labels = labels.t().flatten().index_select(0, context)
        row_losses = self.compute_language_model_loss(row_labels[None], logits)
        losses = spread_rows(row_losses[0], context, labels.numel())
        return losses.view(labels.t().shape).t().contiguous()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Loss of every token, fp32 [b, s]; labels [b, s], logits [s, b, v / tp]."""
        if not uses_kernels(self.config, logits):
            return super().compute_language_model_loss(labels, logits)
        from megatron_glm.model.fused.cross_entropy import vocab_parallel_cross_entropy

        losses = vocab_parallel_cross_entropy(logits, labels.t(), self.tp_group)
        return losses.t().contiguous()


def choose_attention_backend(
    chunks: list[torch.nn.Module],
    *,
    micro_batch_size: int,
    seq_length: int,
    max_samples: int,
    checks_mask: bool,
    checks_kernel: bool,
) -> list[torch.nn.Module]:
    """Has auto mean the fastest backend that works on this GPU at the shape of the run.

    checks_mask, checks_kernel: whether one works that the two checks below would refuse. A hook
    after wrapping, as `check_mask_conformance`, to come before it. On a CPU, and where
    --deterministic-mode asks for the same kernels in every run, auto means what `backends` says.
    """
    model, layer = _first_layer(chunks)
    if layer is None:
        return chunks
    setup = _attention_setup(model, layer, micro_batch_size, seq_length, max_samples)
    is_timed = setup.device.type == "cuda" and not model.config.deterministic_mode
    if setup.backend == "auto" and is_timed:
        from megatron_glm.model.attention.trial import fastest_backend
        from megatron_glm.model.fused.conformance import check_attention_kernel

        def check(setup: AttentionSetup) -> None:
            if checks_mask:
                check_backend(setup)
            if checks_kernel:
                check_attention_kernel(setup)

        best = fastest_backend(setup, model.pg_collection.tp, check)
        for chunk in map(unwrap_model, chunks):
            for layer in chunk.decoder.layers:
                layer.self_attention.core_attention.backend = best
    return chunks


def check_mask_conformance(
    chunks: list[torch.nn.Module], *, micro_batch_size: int, seq_length: int, max_samples: int
) -> list[torch.nn.Module]:
    """Proves prefix attention on this stage's real backend, layout and dtype before training.

    chunks: the stage's models, wrapped as Megatron trains them; returned as they are, as Megatron
    expects of a hook after wrapping. Raises MaskConformanceError on every rank of a tensor
    parallel group in which one fails.
    """
    model, layer = _first_layer(chunks)
    if layer is not None:
        setup = _attention_setup(model, layer, micro_batch_size, seq_length, max_samples)
        check_backend(setup, model.pg_collection.tp)
    return chunks


def check_kernel_conformance(
    chunks: list[torch.nn.Module], *, micro_batch_size: int, seq_length: int, max_samples: int
) -> list[torch.nn.Module]:
    """Compares, on a GPU, each kernel of this run with torch's operations at this stage's widths.

    A hook after wrapping, as `check_mask_conformance`. Raises KernelConformanceError.
    """
    model, layer = _first_layer(chunks)
    if layer is None or layer.self_attention.linear_qkv.weight.device.type not in DEVICES:
        return chunks
    from megatron_glm.model.fused.conformance import NUM_TOKENS, check_kernels
    from megatron_glm.model.fused.operations import Sizes

    config, tp = model.config, model.pg_collection.tp.size()
    setup = _attention_setup(model, layer, micro_batch_size, seq_length, max_samples)
    sizes = Sizes(
        NUM_TOKENS, config.hidden_size, config.ffn_hidden_size // tp, setup.heads, setup.dim,
        model.vocab_size // tp,
    )  # fmt: skip
    check_kernels(
        sizes, setup,
        with_fused=config.glm_fused_kernels,
        with_weight_gradient=config.gradient_accumulation_fusion,
    )
    return chunks


def _first_layer(
    chunks: list[torch.nn.Module],
) -> tuple[GLMModel, TransformerLayer] | tuple[None, None]:
    """The first layer of this stage and its model; a stage may have none."""
    for model in map(unwrap_model, chunks):
        for layer in model.decoder.layers:
            return model, layer
    return None, None


def _attention_setup(
    model: GLMModel,
    layer: TransformerLayer,
    micro_batch_size: int,
    seq_length: int,
    max_samples: int,
) -> AttentionSetup:
    weight, attention = layer.self_attention.linear_qkv.weight, layer.self_attention.core_attention
    # On a CPU the checks would take longer than their answer is worth; its kernels have no tiles
    # that a long sequence would reach and a short one not.
    if weight.device.type == "cpu":
        seq_length = min(seq_length, 256)
    return AttentionSetup(
        backend=attention.backend,
        batch=micro_batch_size,
        seq_length=seq_length,
        heads=layer.self_attention.num_attention_heads_per_partition,
        dim=model.config.kv_channels,
        max_samples=max_samples,
        softmax_scale=attention.softmax_scale,
        dropout_probability=attention.dropout_probability,
        dtype=weight.dtype,
        device=weight.device,
    )


class GLMModelBuilder(GPTModelBuilder):
    """Builds the GLMModel of one pipeline stage; wrapping for training is Megatron's."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GLMModel:
        model_config = self._model_config
        config = model_config.transformer
        vp_size = config.virtual_pipeline_model_parallel_size
        if config.gradient_accumulation_fusion:
            provide_weight_gradient_kernels()
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(
                pg_collection.pp
            )
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(
                pg_collection.pp
            )
        return GLMModel(
            config=config,
            transformer_layer_spec=glm_block_spec(config, vp_stage, pg_collection.pp.rank()),
            vocab_size=model_config.vocab_size,
            max_sequence_length=model_config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=model_config.fp16_lm_cross_entropy,
            parallel_output=model_config.parallel_output,
            share_embeddings_and_output_weights=True,
            position_embedding_type="none",
            rotary_base=model_config.rotary_base,
            scatter_embedding_sequence_parallel=model_config.scatter_embedding_sequence_parallel,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
