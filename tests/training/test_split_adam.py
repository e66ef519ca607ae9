"""Adam on weights in two halves: nothing of an fp32 weight is lost, and steps are those of fp32.

Whole runs by it: test_resume.py. Its kernel: interpreted_split_adam.py.
"""

import copy
from argparse import Namespace

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer

from megatron_glm.errors import FlagError
from megatron_glm.model.fused.conformance import KernelConformanceError
from megatron_glm.training import optimizer, split_adam_kernel
from megatron_glm.training.optimizer import FusedAdam
from megatron_glm.training.split_adam import (
    MAIN_WEIGHT,
    MOMENTS,
    SplitAdam,
    check_split_adam,
    join,
    split,
    step_by_torch,
)
from tests.compiling import GPUS, assert_no_spills, compile_kernel
from tests.ptx.kernel import execute_kernels

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 5), (33,), (1,))


def random_bits(count):
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator)
    return bits.int().view(torch.float32)


def test_every_bit_of_a_weight_is_kept():
    main = random_bits(1_000_000)
    upper, remainder = split(main)
    numbers = ~main.isnan()
    assert join(upper, remainder)[numbers].view(torch.int32).equal(main[numbers].view(torch.int32))
    assert upper[~numbers].isnan().all() and join(upper, remainder)[~numbers].isnan().all()


def test_the_upper_half_is_the_nearest_bf16():
    main = random_bits(1_000_000)
    main = main[~main.isnan()]
    upper, _ = split(main)
    differs = upper != main.bfloat16()
    # torch rounds ties to even; these, and they alone, are rounded away from zero.
    assert 0 < differs.sum() < 50
    assert ((main[differs].view(torch.int32) & 0xFFFF) == 0x8000).all()
    assert (upper[differs].abs().float() > main[differs].abs()).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, float("inf"), -float("inf"), 3.4028e38])
def test_the_ends_of_the_range(value):
    main = torch.tensor([value])
    assert join(*split(main)).view(torch.int32).equal(main.view(torch.int32))


def weights(dtype):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in SHAPES]
    return [torch.nn.Parameter(value.to(dtype)) for value in values]


def take_steps(adam, num_steps, seed=1, dtype=torch.float32):
    """Steps with gradients that are the same for any kind of weights."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        for weight in adam.param_groups[0]["params"]:
            gradient = torch.randn(weight.shape, generator=generator).to(dtype)
            if isinstance(adam, SplitAdam):
                weight.decoupled_grad = gradient
            else:
                weight.grad = gradient.to(weight.dtype)
        adam.step()


@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoupled", [True, False])
def test_steps_are_those_on_main_weights_to_the_bit(decoupled, gradients):
    main, halves = weights(torch.float32), weights(torch.bfloat16)
    one = FusedAdam(main, adam_w_mode=decoupled, **OPTIONS)
    other = SplitAdam(halves, adam_w_mode=decoupled, **OPTIONS)
    for adam in (one, other):
        take_steps(adam, 20, dtype=gradients)
    for weight, expected in zip(halves, main, strict=True):
        assert other.get_unscaled_state(weight, MAIN_WEIGHT).equal(expected)
        assert (weight.float() - expected).abs().le(expected.abs() * 2**-8).all()
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert other.state[weight][name].equal(one.state[expected][name])


def test_moments_in_bf16_are_rounded_once_a_step():
    halves = weights(torch.bfloat16)
    low = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
    adam = SplitAdam(halves, **OPTIONS, **low)
    exact = FusedAdam(weights(torch.float32), **OPTIONS)
    take_steps(adam, 20)
    take_steps(exact, 20)
    for weight, expected in zip(halves, exact.param_groups[0]["params"], strict=True):
        assert {adam.state[weight][name].dtype for name in MOMENTS} == {torch.bfloat16}
        # 20 steps of 1e-2, each off by a rounding of either moment.
        error = adam.get_unscaled_state(weight, MAIN_WEIGHT) - expected
        assert error.abs().max() < 20 * 1e-2 * 2**-7


def test_a_state_is_gone_on_from():
    one, other = weights(torch.bfloat16), weights(torch.bfloat16)
    first, second = (SplitAdam(params, **OPTIONS) for params in (one, other))
    take_steps(first, 3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for source, target in zip(one, other, strict=True):
        target.data.copy_(source.data)
    for adam in (first, second):
        take_steps(adam, 3, seed=2)
    for weight, expected in zip(other, one, strict=True):
        assert weight.equal(expected)
        for name, value in second.state[weight].items():
            assert value.equal(first.state[expected][name])


def test_a_main_weight_that_is_set_sets_the_weight():
    (weight, *_) = params = weights(torch.bfloat16)
    adam = SplitAdam(params, **OPTIONS)
    main = torch.randn(SHAPES[0])
    adam.set_scaled_state(weight, MAIN_WEIGHT, main)
    assert adam.get_unscaled_state(weight, MAIN_WEIGHT).equal(main)
    assert weight.equal(split(main)[0])


@pytest.mark.parametrize("dtype, options, message", [
    (torch.float16, {}, "--use-precision-aware-optimizer: a weight is in torch.float16"),
    (torch.bfloat16, {"master_weight_dtype": torch.float16}, "--main-params-dtype torch.float16"),
    (torch.bfloat16, {"exp_avg_dtype": torch.float16}, "--exp-avg-dtype torch.float16: must be"),
    (torch.bfloat16, {"exp_avg_sq_dtype": torch.uint8}, "--exp-avg-sq-dtype torch.uint8: must be"),
])  # fmt: skip
def test_what_it_cannot_hold_is_refused(dtype, options, message):
    with pytest.raises(FlagError, match=message):
        SplitAdam(weights(dtype), **OPTIONS, **options)


@pytest.mark.parametrize("gpu", GPUS)
def test_the_kernel_compiles_without_spilling(gpu, tmp_path):
    pointers = {"weight": "*i16", "remainder": "*i16", "gradient": "*fp32", "first": "*fp32",
                "second": "*fp32"}  # fmt: skip
    scalars = ("rate", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "step_size",
               "root_of_correction")  # fmt: skip
    constants = {name: value for name, value in split_adam_kernel.BLOCK.items() if name.isupper()}
    program = compile_kernel(
        split_adam_kernel.split_adam_step,
        {f"{name}_pointer": of for name, of in pointers.items()} | {"num_weights": "i32"}
        | dict.fromkeys(scalars, "fp32") | {"DECOUPLED": 1} | constants,
        split_adam_kernel.BLOCK["num_warps"], gpu,
    )  # fmt: skip
    assert_no_spills(program, tmp_path, gpu)
    # Four weights of a thread at once, each way.
    assert "ld.global.v4.b32" in program.asm["ptx"] and "st.global.v4.b32" in program.asm["ptx"]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("decoupled, gradients, moments", [
    (True, torch.float32, torch.float32), (False, torch.bfloat16, torch.bfloat16),
])  # fmt: skip
def test_the_compiled_kernel_takes_the_steps_of_torch(
    decoupled, gradients, moments, gpu, monkeypatch
):
    execute_kernels(monkeypatch, split_adam_kernel, gpu)
    generator = torch.Generator().manual_seed(0)
    # No multiple of what a program takes, and NaN at the end.
    main = torch.cat([torch.randn(3000, generator=generator), torch.tensor([torch.nan])])
    group = OPTIONS | {"adam_w_mode": decoupled}
    runs = []
    for step in (split_adam_kernel.step_by_kernel, step_by_torch):
        generator.manual_seed(1)
        weight, remainder = split(main)
        zeros = {name: torch.zeros_like(main, dtype=moments) for name in MOMENTS}
        state = {"step": torch.zeros(()), MAIN_WEIGHT: remainder, **zeros}
        for _ in range(3):
            step(weight, torch.randn(main.shape, generator=generator).to(gradients), state, group)
        runs.append([join(weight, remainder), *(state[name] for name in MOMENTS)])
    found, expected = runs
    # Two roundings a step of weights below 4; of moments the next number, and some bits of fp32
    # where they cancel.
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=3 * 2**-21, equal_nan=True)
    eps = torch.finfo(moments).eps
    torch.testing.assert_close(found[1:], expected[1:], rtol=eps, atol=2**-22, equal_nan=True)


@pytest.mark.parametrize("asked, own, uses", [
    (True, optimizer.adam, True), (True, torch.optim.Adam, False), (False, optimizer.adam, False),
])  # fmt: skip
def test_another_adam_that_holds_main_weights_is_left_alone(asked, own, uses, monkeypatch):
    monkeypatch.setattr(megatron_optimizer, "Adam", own)
    args = Namespace(use_precision_aware_optimizer=asked)
    assert optimizer.uses_split_adam(args) is uses


@pytest.mark.gpu
def test_the_check_at_start_passes_on_a_gpu():
    check_split_adam([torch.nn.Linear(1, 1, device="cuda")])


@pytest.mark.gpu
def test_the_check_at_start_finds_a_wrong_kernel(monkeypatch):
    def without_decay(weight, gradient, state, group):
        step_by_kernel(weight, gradient, state, group | {"weight_decay": 0.0})

    step_by_kernel = split_adam_kernel.step_by_kernel
    monkeypatch.setattr(split_adam_kernel, "step_by_kernel", without_decay)
    with pytest.raises(KernelConformanceError, match="Train without --use-precision-aware-opt"):
        check_split_adam([torch.nn.Linear(1, 1, device="cuda")])
