"""Transformer Engine without a GPU: all of its Python, with torch in the place of its kernels.

Preloaded by a rank server (see ranks.py), it shows what the linears and the optimizer do around
their kernels: collectives, shards, gradient buffers, states, checkpoints. Numbers of the kernels
themselves need a GPU.
"""

import importlib
from unittest import mock

import torch
from transformer_engine.pytorch import optimizers
from transformer_engine.pytorch.module import base, linear

import patches


def general_gemm(a, b, out_dtype, layout="TN", out=None, bias=None, grad=False, accumulate=False,
                 **unused):
    """b @ a^T (TN), b @ a (NN) or b^T @ a (NT) and, for a weight gradient, that of the bias."""
    flat_a, flat_b = a.flatten(0, -2), b.flatten(0, -2)
    if layout == "NT":
        product = flat_b.t().to(out_dtype) @ flat_a.to(out_dtype)
    else:
        product = b @ (flat_a.t() if layout == "TN" else flat_a)
    bias_gradient = flat_b.sum(0) if grad and bias is not None else None
    if bias is not None and not grad:
        product = product + bias
    if out is None:
        out = product.to(out_dtype)
    else:
        out.copy_(out + product if accumulate else product)
    return out, bias_gradient, None, None


def prepare_forward(self, inp, num_gemms=1, **unused):
    """As the original, for an input that is on the CPU."""
    self.fast_setattr("allow_different_data_and_param_types", False)
    self.set_activation_dtype(inp)
    self.init_fp8_metadata(num_gemms=num_gemms)
    return inp.contiguous()


def adam(chunk_size, overflow, lists, lr, beta1, beta2, eps, step, decoupled, bias_correction,
         weight_decay):
    """One step of AdamW in fp32, in place."""
    # As the binding does, which takes no float for an integer.
    step, decoupled, bias_correction = map(int.__index__, (step, decoupled, bias_correction))
    assert decoupled and bias_correction
    for gradient, weight, mean, square in zip(*lists, strict=True):
        gradient = gradient.float()
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
        weight.sub_(lr * (mean / (1 - beta1**step) / scale + weight_decay * weight))


def l2_norm(chunk_size, overflow, lists, per_tensor):
    """Norm of all tensors together."""
    return torch.stack([x.float().norm() for x in lists[0]]).norm().view(1), None


def scale(chunk_size, overflow, lists, factor):
    """lists[1] = lists[0] * factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def initialize(original):
    """Initialiser of a module that is not stopped by the lack of a GPU."""

    def initialize_without_gpu(self, *args, **kwargs):
        with mock.patch("torch.cuda.is_available", return_value=True):
            original(self, *args, **kwargs)

    return initialize_without_gpu


linear.general_gemm = general_gemm
base.TransformerEngineBaseModule.__init__ = initialize(base.TransformerEngineBaseModule.__init__)
base.TransformerEngineBaseModule.prepare_forward = prepare_forward
base.TransformerEngineBaseModule.end_forward = lambda self: None
optimizers.fused_adam.tex = mock.Mock(wraps=optimizers.fused_adam.tex, multi_tensor_adam=adam)
optimizers.multi_tensor_l2norm = l2_norm
optimizers.multi_tensor_scale = optimizers.multi_tensor_scale_tensor = scale

# Neither the patch that would hide all this, nor those for machines on which it is hidden.
IDLE = ("no GPU, but Transformer Engine or Apex", "no Transformer Engine or Apex")
kept = {name: patch for name, patch in patches.load().items() if patch.when not in IDLE}
with mock.patch("patches.load", return_value=kept):
    patches.apply()
importlib.import_module("tests.rank_preload")
