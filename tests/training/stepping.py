"""A small GLM with Megatron's DDP and optimizer, stepped inside a rank of a test."""

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_glm.training.optimizer import provide_fused_optimizer
from tests.model.building import build_glm

SEQUENCE, VOCABULARY = 24, 128
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stepping:
    """Trains a model on random tokens; `losses` is the mean loss of each step so far."""

    def __init__(
        self, dtype: str = "fp32", distributed: bool = False, precision_aware: bool = False,
        **options,
    ):  # fmt: skip
        if precision_aware:
            provide_fused_optimizer()
        kind = DTYPES[dtype]
        if kind is not torch.float32:
            options |= {dtype: True, "params_dtype": kind, "pipeline_dtype": kind}
        (glm,) = build_glm(vocab_size=VOCABULARY, seq_length=SEQUENCE,
                           calculate_per_token_loss=True, **options)
        self.model = DistributedDataParallel(
            glm.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=distributed
            ),
            glm,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=1e-3, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0, params_dtype=kind,
                bf16=dtype == "bf16", fp16=dtype == "fp16", initial_loss_scale=64.0,
                min_loss_scale=2.0**-16, use_distributed_optimizer=distributed,
                use_precision_aware_optimizer=precision_aware,
            ),
            [self.model],
        )
        glm.config.grad_scale_func = self.optimizer.scale_loss
        glm.config.finalize_model_grads_func = finalize_model_grads
        self.generator = torch.Generator().manual_seed(0)
        self.losses: list[float] = []

    def forward_backward(self) -> None:
        """Two micro-batches."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        device = next(self.model.parameters()).device
        batches = iter([
            torch.randint(VOCABULARY, (2, SEQUENCE), generator=self.generator).to(device)
            for _ in range(2)
        ])  # fmt: skip
        position_ids = torch.arange(SEQUENCE, device=device).expand(2, -1)
        samples = torch.tensor([[[9], [SEQUENCE]]], dtype=torch.int32, device=device)
        samples = samples.expand(2, -1, -1)

        def forward_step(data_iterator, model):
            tokens = next(batches)
            losses = model(tokens, position_ids, samples, labels=tokens)
            count = torch.tensor(tokens.numel(), dtype=torch.int)
            return losses, lambda out: (out.float().sum(), count, {"loss": out.detach().mean()})

        report = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=None, model=self.model,
            num_microbatches=2, seq_length=SEQUENCE, micro_batch_size=2, forward_only=False,
        )
        self.losses.append(sum(part["loss"].item() for part in report) / len(report))

    def step(self) -> tuple[bool, float]:
        """One whole step; whether the weights were changed, and the norm of the gradient."""
        self.forward_backward()
        changed, grad_norm, _ = self.optimizer.step()
        return changed, grad_norm
