"""Kernels and operations are told apart by name, and all of the time is accounted for."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.training import components


@pytest.mark.parametrize("name, launched_from, expected", [
    ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", ["aten::mm", "aten::linear"], "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128", ["aten::addmm"], "products"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", ["aten::bmm"], "attention"),
    ("triton_tem_fused_flex_attention_0", ["Torch-Compiled Region: 0/0"], "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", [], "attention"),
    ("void pytorch_flash::flash_fwd_kernel<...>", [], "attention"),
    ("forward", ["_PrefixAttention"], "attention"),
    ("backward_keys", ["_PrefixAttentionBackward"], "attention"),
    ("void (anonymous namespace)::softmax_warp_forward<float>", ["aten::_softmax"], "attention"),
    ("triton_red_fused__log_softmax_12", [], "cross_entropy"),
    ("void at::native::vectorized_elementwise_kernel<4>",
     ["aten::exp", "_VocabParallelCrossEntropy"], "cross_entropy"),
    ("void at::native::vectorized_elementwise_kernel<4>",
     ["aten::mul", "_VocabParallelCrossEntropyBackward"], "cross_entropy"),
    ("void at::native::multi_tensor_apply_kernel<AdamW>", ["aten::_fused_adamw_"], "optimizer"),
    ("void at::native::vectorized_elementwise_kernel<4>",
     ["aten::copy_", components.OPTIMIZER], "optimizer"),
    ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", [], "communication"),
    ("void at::native::vectorized_elementwise_kernel<4>", ["aten::mul"], "element_wise"),
    ("void at::native::layer_norm_kernel", ["aten::native_layer_norm"], "element_wise"),
    ("Memcpy DtoD (Device -> Device)", ["aten::broadcast_tensors"], "element_wise"),
])  # fmt: skip
def test_a_component_of_each_kernel(name, launched_from, expected):
    assert components.component(name, launched_from) == expected


def test_all_time_of_a_step_is_accounted_for():
    a = torch.randn(700, 700)

    def step():
        for _ in range(5):
            (a @ a).relu_()
        time.sleep(0.05)
        a.sum()

    step()
    begin = time.perf_counter()
    times = components.profiled(step, torch.device("cpu"))
    elapsed = (time.perf_counter() - begin) * 1e3
    assert set(times) == set(components.COMPONENTS)
    assert times["products"] > times["element_wise"] > 0
    assert times["idle"] >= 50 and sum(times.values()) <= elapsed


def event(name, start, end, kind=DeviceType.CUDA, kernels=(), parent=None, mark=False):
    length = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(
        name=name, time_range=length, device_type=kind, cpu_parent=parent, is_user_annotation=mark,
        kernels=[SimpleNamespace(name=k, duration=d) for k, d in kernels],
    )


def test_kernels_are_classified_by_what_launched_them_and_gaps_are_idle():
    optimizer = event(components.OPTIMIZER, 0, 90, DeviceType.CPU)
    copy = event("aten::copy_", 5, 6, DeviceType.CPU, [("elementwise_kernel", 30)], optimizer)
    mul = event("aten::mul", 7, 8, DeviceType.CPU, [("elementwise_kernel", 10)])
    kernels = [
        event("elementwise_kernel", 100, 130), event("elementwise_kernel", 150, 160),
        event("nvjet_tst", 155, 170), event(components.OPTIMIZER, 90, 200, mark=True),
    ]  # fmt: skip
    times = components.kernel_times([optimizer, copy, mul, *kernels])
    assert times == {"optimizer": 30, "element_wise": 10, "products": 15, "idle": 20}
