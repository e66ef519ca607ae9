"""Builds small GLMs on the calling rank and runs them through Megatron's own schedules."""


import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_glm.model.config import GLMModelConfig, GLMTransformerConfig
from megatron_glm.model.glm_model import GLMModel, GLMModelBuilder


def build_glm(
    *,
    num_layers: int = 4,
    hidden_size: int = 64,
    ffn_hidden_size: int = 176,
    num_attention_heads: int = 4,
    vocab_size: int = 512,
    seq_length: int = 96,
    **options,
) -> list[GLMModel]:
    """The model chunks of this rank in the parallel layout that is set up; dropout is off unless
    asked for."""
    vp = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    defaults = dict(hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.0052,
                    params_dtype=torch.float32, pipeline_dtype=torch.float32)
    config = GLMTransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=num_attention_heads,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=vp,
        **defaults | options,
    )
    builder = GLMModelBuilder(
        GLMModelConfig(transformer=config, vocab_size=vocab_size, seq_length=seq_length)
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stages = [None] if vp is None else range(vp)
    return [builder.build_model(groups, vp_stage=stage) for stage in stages]


def forward_logits(
    chunks: list[GLMModel], tokens: torch.Tensor, position_ids: torch.Tensor, samples: torch.Tensor
) -> torch.Tensor | None:
    """Logits [b, s, v] of the whole model on the last stage, None elsewhere, by the schedule that
    trains: one micro-batch, forward only, gathered over tensor parallel ranks."""

    def forward_step(data_iterator, model):
        logits = model(tokens, position_ids, samples)

        def collect(output):
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(output)
            return output.sum(), {"logits": whole}

        return logits, collect

    num_chunks = len(chunks)
    stored = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * num_chunks if num_chunks > 1 else None,
        model=chunks if num_chunks > 1 else chunks[0],
        num_microbatches=1 if num_chunks == 1 else parallel_state.
        get_pipeline_model_parallel_world_size(),
        seq_length=tokens.shape[1],
        micro_batch_size=tokens.shape[0],
        forward_only=True,
    )
    return stored[0]["logits"].detach() if stored else None


def sample_bounds(samples, seq_length: int) -> torch.Tensor:
    """Rows (start, context_length, length), as golden data has them, as [b, 2, k] int32."""
    samples = torch.as_tensor(samples)
    ends = samples[..., 0] + samples[..., 2]
    ends = torch.where(samples[..., 2] > 0, ends, seq_length)
    return torch.stack((samples[..., 1], ends), dim=1).int()


