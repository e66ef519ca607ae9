"""Prefix attention in Megatron's slot: its interface, its refusals, dropout and recomputation."""

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.core_attention import PrefixAttention
from megatron_glm.model.config import GLMTransformerConfig
from tests.model.attention.packs import PACKS, random_inputs, run, samples_from
from tests.ranks import run_ranks

BATCH = PACKS["unequal, two sequences"]


def build(training=True, heads=4, **options):
    defaults = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": heads,
                "attention_dropout": 0.1, "hidden_dropout": 0.0}
    config = GLMTransformerConfig(**defaults | options)
    module = PrefixAttention(
        config, layer_number=1, attn_mask_type=AttnMaskType.arbitrary, attention_type="self",
        softmax_scale=config.softmax_scale,
    )
    return module.train(training)


def inputs(heads=4, dtype=torch.float32):
    samples = samples_from(BATCH)
    mixed, grad = (x.to(dtype) for x in random_inputs(samples, heads, 16))
    return mixed, grad, samples


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_reference_in_evaluation(backend, dtype):
    mixed, grad, samples = inputs(dtype=dtype)
    module = build(training=False, glm_attention_backend=backend)
    out = module(*mixed.split(16, dim=-1), samples, attn_mask_type=AttnMaskType.arbitrary,
                 attention_bias=None, packed_seq_params=None)
    exact, _ = run("reference", mixed.double(), grad.double(), samples)
    assert out.dtype == dtype and out.shape == exact.shape
    limit = 1e-5 if dtype == torch.float32 else 4 * 2**-9
    assert (out.double() - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_query_groups": 2}, "--num-query-groups 2: leave out --group-query-attention"),
        ({"window_size": (128, 0)}, "--window-size"),
        ({"softmax_type": "off-by-one"}, "--softmax-type off-by-one"),
        ({"apply_query_key_layer_scaling": True}, "--apply-query-key-layer-scaling"),
        ({"glm_attention_backend": "fastest"}, "--glm-attention-backend fastest: unknown"),
    ],
)
def test_what_glm_does_not_have_is_refused_by_flag(options, message):
    with pytest.raises(GLMError, match=message):
        build(**options)


def test_other_descriptions_of_a_pack_are_refused():
    mixed, _, samples = inputs()
    with pytest.raises(ValueError, match="neither attention_bias nor packed_seq_params"):
        build()(*mixed.split(16, dim=-1), samples, packed_seq_params=object())


def step(recompute: bool, sequence_parallel: bool):
    """Output and gradient of one call with dropout, with or without Megatron's recomputation."""
    tensor_parallel.model_parallel_cuda_manual_seed(99)
    mixed, grad, samples = inputs()
    mixed.requires_grad_()
    module = build(sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)

    def forward(mixed, samples):
        return module(*mixed.split(16, dim=-1), samples)

    out = tensor_parallel.checkpoint(forward, False, mixed, samples) if recompute else forward(
        mixed, samples)
    # What runs between forward and backward must not change what the second forward drops.
    with tensor_parallel.get_cuda_rng_tracker().fork():
        torch.rand(5)
    torch.rand(3)
    out.backward(grad)
    return out.detach(), mixed.grad


def recomputation(sequence_parallel):
    plain, again = step(False, sequence_parallel), step(True, sequence_parallel)
    mixed, grad, samples = inputs()
    without, _ = run("reference", mixed, grad, samples)
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "equal": all(torch.equal(a, b) for a, b in zip(plain, again, strict=True)),
        "dropped": bool((plain[0] - without).abs().max() > 1e-2),
        "out": plain[0],
    }


@pytest.mark.ranks
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation_drops_the_same_and_every_rank_its_own(sequence_parallel):
    first, second = run_ranks(recomputation, sequence_parallel, tensor_model_parallel_size=2)
    for rank in (first, second):
        assert rank["tp"] == 2 and rank["equal"] and rank["dropped"]
    # Both ranks got the same inputs here. Without sequence parallelism attention forks the state
    # of its rank itself; with it the transformer block has forked before.
    assert torch.equal(first["out"], second["out"]) == sequence_parallel


def test_evaluation_and_zero_dropout_draw_nothing():
    mixed, _, samples = inputs()
    state = torch.get_rng_state()
    for module in (build(training=False), build(attention_dropout=0.0)):
        module(*mixed.split(16, dim=-1), samples)
    assert torch.equal(torch.get_rng_state(), state)
