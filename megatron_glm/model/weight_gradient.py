"""Weight gradients added to the fp32 gradient buffer by the matrix product itself.

Megatron's linears do this by an extension of Apex, `fused_weight_gradient_mlp_cuda`; without it a
weight's gradient is written in 16 bits, read again, widened and added: 12 bytes an element and
micro-batch instead of 8, and rounded to 16 bits on the way. cuBLAS adds to its output by itself.
"""

import sys

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def provide_weight_gradient_kernels() -> None:
    """Stands in for Apex's extension in Megatron's linears; does nothing where that is installed.

    Only Megatron's linears see the stand-in: other programs must not take it for Apex.
    """
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
        layers._grad_accum_fusion_available = True


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T @ total_input, products and sum in fp32; named as Apex names it.

    total_input: [tokens, in] and grad_output: [tokens, out], both fp32, bf16 or fp16; main_grad:
    [out, in] fp32, changed in place.
    """
    if grad_output.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
    elif main_grad.is_cuda:
        torch.addmm(
            main_grad, grad_output.t(), total_input, out_dtype=main_grad.dtype, out=main_grad
        )
    else:
        main_grad.addmm_(grad_output.t().to(main_grad.dtype), total_input.to(main_grad.dtype))


def wgrad_gemm_accum_fp16(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """The same for a 16-bit `main_grad` of the dtype of both inputs; rounds once a micro-batch."""
    main_grad.addmm_(grad_output.t(), total_input)
