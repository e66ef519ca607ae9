"""The engine's logits are those of the released code, whatever the layout, batch and cache."""

import pytest
import torch
import torch.nn.functional as F

from megatron_glm.checkpoint.quantization import quantize
from megatron_glm.checkpoint.reference import forward
from megatron_glm.inference import engine as engine_module
from megatron_glm.inference.layout import Layout, process_group
from tests.checkpoint.building import MemorySource
from tests.inference.building import CPU, golden_difference, make_engine
from tests.ranks import run_ranks

TOLERANCE = 1e-4


@pytest.mark.parametrize("angles", ["fp32", "fp16"])
def test_golden_logits(angles):
    assert golden_difference(angles) < TOLERANCE


def golden_on_a_rank(tp_size, pp_size):
    with process_group(CPU):
        layout = Layout.create(tp_size, pp_size)
        return [golden_difference(angles, layout) for angles in ("fp32", "fp16")]


@pytest.mark.ranks
@pytest.mark.parametrize("tp_size, pp_size", [(2, 1), (1, 2), (2, 2)])
def test_golden_logits_on_several_ranks(tp_size, pp_size):
    results = run_ranks(
        golden_on_a_rank, tp_size, pp_size, world_size=tp_size * pp_size, initialize=False
    )
    assert max(max(result) for result in results) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("angles", ["fp32", "fp16"])
def test_golden_logits_on_a_gpu(angles, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert golden_difference(angles, device=torch.device("cuda")) < TOLERANCE


@pytest.mark.parametrize("dtype, share", [(torch.bfloat16, 0.048), (torch.float16, 0.006)])
def test_golden_logits_in_half_precision(dtype, share):
    """Within a share of the largest logit, 19.6; an export under transformers is off by as much."""
    assert golden_difference("fp32", dtype=dtype) < share * 19.6


@pytest.fixture
def source():
    return MemorySource(dtype=torch.float32, seed=1)


def logits_of(source, tokens, position_ids, context_length):
    """The whole sequence at once, under a dense mask."""
    return forward(
        source.weights.__getitem__,
        source.settings.dimensions,
        torch.tensor([tokens]),
        torch.tensor([position_ids]),
        torch.tensor([[[0, context_length, len(tokens)]]]),
        source.settings.rotary_angle_dtype,
    )[0, context_length:]


@pytest.mark.parametrize("context_length", [1, 5, 23])
def test_prefill_and_steps_are_one_masked_forward(source, context_length):
    tokens = torch.randint(64, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    positions = [*range(context_length), *[context_length // 2] * (30 - context_length)]
    engine = make_engine(source)
    engine.prefill([tokens[:context_length]])
    steps = [
        engine.decode([tokens[i]], [positions[i]])[0] for i in range(context_length, len(tokens))
    ]
    expected = logits_of(source, tokens, positions, context_length)
    torch.testing.assert_close(torch.stack(steps), expected, atol=2e-5, rtol=0)


def test_rows_of_a_batch_are_what_they_are_alone(source):
    """Contexts of mixed lengths, of which neighbours are equally long, and one that joins later."""
    contexts = [[5, 6, 7], [8, 9, 10], [11], list(range(20, 60)), [1, 2]]
    engine, alone = make_engine(source), make_engine(source)
    engine.prefill(contexts[:4])
    engine.decode([3, 4, 5, 6], [3, 3, 1, 40])
    engine.prefill(contexts[4:])
    together = engine.decode([7, 8, 9, 10, 11], [4, 4, 2, 41, 2])
    first = [[3, 7], [4, 8], [5, 9], [6, 10], [11]]
    for row, (context, tokens) in enumerate(zip(contexts, first, strict=True)):
        alone.cache = alone.new_cache()
        alone.prefill([context])
        for i, token in enumerate(tokens):
            logits = alone.decode([token], [len(context) + i])
        torch.testing.assert_close(together[row], logits[0], atol=1e-5, rtol=0)


def test_contexts_are_read_in_packs_of_limited_length(source, monkeypatch):
    contexts = [[1, 2, 3], [4, 5], list(range(9)), [6], [7, 8]]
    results = []
    for limit in (10**6, 5):
        monkeypatch.setattr(engine_module, "PREFILL_TOKENS", limit)
        engine = make_engine(source)
        engine.prefill(contexts)
        results.append(engine.decode([1] * 5, [len(context) for context in contexts]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_prefill_has_no_mask(source, monkeypatch):
    calls = []

    def attention(query, key, value, attn_mask=None, **options):
        calls.append((attn_mask, options))
        return sdpa(query, key, value, attn_mask=attn_mask, **options)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(engine_module.F, "scaled_dot_product_attention", attention)
    engine = make_engine(source)
    engine.prefill([[1, 2, 3], [4, 5]])
    assert calls and all(call == (None, {}) for call in calls)
    calls.clear()
    engine.decode([6, 7], [3, 2])
    # A step needs the rows' lengths, [rows, 1, 1, tokens].
    assert {tuple(mask.shape) for mask, _ in calls} == {(2, 1, 1, 4)}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_those_that_they_stand_for(source, bits):
    """fp32 arithmetic on codes is that on code times scale."""
    plain = MemorySource(dtype=torch.float32, seed=1)
    for name, weight in plain.weights.items():
        if ".linear_" in name and name.endswith("weight"):
            codes = quantize(weight, bits)
            plain.weights[name] = codes.codes * codes.scales.float()
    results = []
    for engine in (make_engine(source, bits=bits), make_engine(plain)):
        engine.prefill([[1, 2, 3, 4]])
        results.append(engine.decode([5], [4]))
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)
