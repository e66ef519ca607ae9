"""The operations of a step are those that an independent counter finds."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.training import llama, work
from benchmarks.training.turns import Task
from benchmarks.training.work import Size

SIZE = Size(3, 64, 4, 160, 96, 32, micro_batch_size=2, num_micro_batches=1)
H4096 = Size(12, 4096, 32, 10880, 50304, 2048, 4, 8)


def test_operations_are_those_that_torch_counts():
    model = llama.build(Task("", SIZE, "fp32"), torch.device("cpu"))
    # Unfused, so that the counter sees its products: of all pairs.
    model.set_attn_implementation("eager")
    tokens = torch.randint(SIZE.vocab_size, (SIZE.micro_batch_size, SIZE.seq_length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    expected = work.model_flops(SIZE, work.formula_load(SIZE))
    # Beside them there are only the products of positions and frequencies, on two axes.
    assert expected <= counter.get_total_flops() < 1.001 * expected
    weights = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert work.num_weights(SIZE) == weights


def test_the_formula_of_the_paper():
    h, layers, s, v = 12288, 70, 2048, 150528
    size = Size(layers, h, 96, 32768, v, s, 1, 1)
    expected = 72 * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert work.model_flops(size, work.formula_load(size)) == pytest.approx(expected, rel=1e-12)


def test_a_measured_speed_in_both_units():
    # 31,270 tokens/s of a causal model of this size were 510 TFLOP/s.
    a_token = work.model_flops(H4096, work.causal_load(H4096)) / H4096.num_tokens
    assert 31270 * a_token == pytest.approx(510e12, rel=1e-3)


def test_the_load_of_a_causal_mask():
    pairs = SIZE.num_sequences * torch.ones(32, 32).tril().sum()
    assert work.causal_load(SIZE) == (pairs, SIZE.num_tokens)


def test_logits_count_for_targets_only():
    whole = work.causal_load(SIZE)
    fewer = whole._replace(targets=whole.targets - 1)
    logits = 6 * SIZE.hidden_size * SIZE.vocab_size
    assert work.model_flops(SIZE, whole) - work.model_flops(SIZE, fewer) == logits


def test_bytes_grow_with_tokens_and_layers_and_the_optimizer_does_not_see_the_batch():
    larger, smaller = (
        work.element_wise_bytes(replace(H4096, num_layers=layers), H4096.num_tokens)
        for layers in (13, 12)
    )
    weights = 4 * 4096**2 + 3 * 4096 * 10880
    expected = 2 * (37 * 4096 + 10 * 10880) * H4096.num_tokens + 10 * weights * 8
    assert larger - smaller == expected
    longer = replace(H4096, num_micro_batches=80)
    assert work.optimizer_bytes(longer) == work.optimizer_bytes(H4096)


def test_a_prediction_is_the_sum_of_its_parts():
    rates = work.Rates(product_flops=1e12, attention_flops=5e11, copy_bytes=1e9)
    load = work.Load(pairs=10**4, targets=100)
    assert work.predicted_seconds(SIZE, load, rates) == pytest.approx(
        work.product_flops(SIZE, 100) / 1e12
        + work.attention_flops(SIZE, load) / 5e11
        + (work.element_wise_bytes(SIZE, 100) + work.optimizer_bytes(SIZE)) / 1e9
    )
