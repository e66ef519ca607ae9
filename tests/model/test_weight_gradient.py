"""Fused weight gradients: the product, and whole models with and without them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers

from megatron_glm.model import weight_gradient
from tests.model.building import build_glm
from tests.ranks import run_ranks

TOKENS, IN, OUT = 24, 12, 20
SEQUENCE, VOCABULARY, MICRO_BATCHES = 24, 128, 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def operands(dtype, main_dtype, device):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator)
               for shape in ((TOKENS, IN), (TOKENS, OUT), (OUT, IN))]
    return [x.to(device, kind) for x, kind in zip(tensors, (dtype, dtype, main_dtype), strict=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_that_in_fp64_to_fp32_rounding(dtype, device):
    total_input, grad_output, main_grad = operands(dtype, torch.float32, device)
    expected = main_grad.double() + grad_output.double().t() @ total_input.double()
    address = main_grad.data_ptr()
    weight_gradient.wgrad_gemm_accum_fp32(total_input, grad_output, main_grad)
    assert main_grad.data_ptr() == address
    # TOKENS products of size 1, each rounded to fp32; tensor cores add 16 of them at a time, cut
    # off at the last bit of the largest: emulated with these operands, 1.65 times as much.
    units = 2 * TOKENS if device == "cuda" and dtype != torch.float32 else TOKENS
    torch.testing.assert_close(main_grad.double(), expected, rtol=0, atol=units * 2.0**-23)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_sum_is_rounded_once(dtype, device):
    total_input, grad_output, main_grad = operands(dtype, dtype, device)
    expected = main_grad.double() + grad_output.double().t() @ total_input.double()
    weight_gradient.wgrad_gemm_accum_fp16(total_input, grad_output, main_grad)
    bound = torch.finfo(dtype).eps * expected.abs() + TOKENS * 2.0**-23
    assert ((main_grad.double() - expected).abs() <= bound).all()


def test_an_installed_extension_is_left_alone(monkeypatch):
    apex = SimpleNamespace()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    weight_gradient.provide_weight_gradient_kernels()
    assert layers.fused_weight_gradient_mlp_cuda is apex


def main_gradients(options: dict, overlap: bool, alpha: float) -> dict[str, np.ndarray]:
    """Gradients of every weight of this rank after a step of MICRO_BATCHES, by Megatron's DDP."""
    (model,) = build_glm(vocab_size=VOCABULARY, seq_length=SEQUENCE, calculate_per_token_loss=True,
                         shrink_embedding_gradient_alpha=alpha, **options)
    wrapped = DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(
            overlap_grad_reduce=overlap, grad_reduce_in_fp32=True, average_in_collective=False
        ),
        model,
    )
    wrapped.zero_grad_buffer()
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = wrapped.no_sync
    rank = parallel_state.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(rank)
    batches = iter([torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)
                    for _ in range(MICRO_BATCHES)])
    position_ids = torch.arange(SEQUENCE).expand(2, -1)
    samples = torch.tensor([[[9], [SEQUENCE]]], dtype=torch.int32).expand(2, -1, -1)

    def forward_step(data_iterator, model):
        tokens = next(batches)
        losses = model(tokens, position_ids, samples, labels=tokens)
        count = torch.tensor(tokens.numel(), dtype=torch.int)
        return losses, lambda out: (out.float().sum(), count, {"loss": out.detach().sum()})

    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=None, model=wrapped,
        num_microbatches=MICRO_BATCHES, seq_length=SEQUENCE, micro_batch_size=2,
        forward_only=False,
    )
    assert all(p.grad is None for p in model.parameters())
    return {name: p.main_grad.float().numpy() for name, p in model.named_parameters()}


LAYOUTS = {
    "one rank": ({}, 1, False),
    "tp 2, pp 2": (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4, False
    ),
    "tp 2, sequence parallel": ({"tensor_model_parallel_size": 2}, 2, False),
    "dp 2, overlapped": ({}, 2, True),
}
BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True}


@pytest.mark.ranks
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), ("bf16", 2e-2)])
def test_gradients_are_those_without_fusion(name, dtype, tolerance):
    """In bf16 the unfused ones are rounded once a micro-batch, the fused ones never."""
    layout, world_size, overlap = LAYOUTS[name]
    options = dict(BF16) if dtype == "bf16" else {}
    options["sequence_parallel"] = "sequence" in name
    plain, fused = (
        run_ranks(main_gradients, options | {"gradient_accumulation_fusion": fusion}, overlap, 0.1,
                  world_size=world_size, **layout)
        for fusion in (False, True)
    )
    for expected, gradients in zip(plain, fused, strict=True):
        assert gradients.keys() == expected.keys()
        for weight, gradient in gradients.items():
            scale = np.abs(expected[weight]).max()
            assert scale > 0, weight
            assert np.abs(gradient - expected[weight]).max() <= tolerance * scale, weight


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["one rank", "tp 2, pp 2"])
def test_the_embedding_gradient_is_shrunk_exactly(name):
    layout, world_size, overlap = LAYOUTS[name]
    options = {"gradient_accumulation_fusion": True}
    whole, shrunk = (
        run_ranks(main_gradients, options, overlap, alpha, world_size=world_size, **layout)
        for alpha in (1.0, 0.125)
    )
    tied = ("embedding.word_embeddings.weight", "output_layer.weight")
    for expected, gradients in zip(whole, shrunk, strict=True):
        for weight, gradient in gradients.items():
            # A power of two, so that no order of rounding hides an error.
            factor = np.float32(0.125 if weight in tied else 1.0)
            np.testing.assert_array_equal(gradient, expected[weight] * factor, err_msg=weight)
