"""The conformance check passes what is right and names what is wrong."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import NO_DROPOUT, backends_of, load_backend
from megatron_glm.model.attention.bounds import validate_samples
from megatron_glm.model.attention.conformance import (
    AttentionSetup,
    MaskConformanceError,
    check_attention,
    check_backend,
    check_model,
    probe_samples,
)
from tests.model.attention.libraries import skip_without_library
from tests.ranks import run_ranks

SETUP = AttentionSetup(
    backend="x", batch=1, seq_length=160, heads=2, dim=16, max_samples=8, softmax_scale=0.25,
    dropout_probability=0.0, dtype=torch.float32, device=torch.device("cpu"),
)  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
reference = partial(load_backend("reference"), softmax_scale=0.25)


def causal(samples):
    samples[:, 0] = 0


def full(samples):
    samples[:, 0, 0] = samples[:, 1] = samples[0, 1, -1].item()


def unpacked(samples):
    samples[:, 0, 1:] = 0
    samples[:, 1] = samples[0, 1, -1].item()


def context_too_long(samples):
    samples[:, 0] += ((samples[:, 0] > 0) & (samples[:, 1] < samples[0, 1, -1])).int()


def context_too_short(samples):
    samples[:, 0] -= (samples[:, 0] > 0).int()


def boundary_shifted(samples):
    samples[:, 1] += (samples[:, 1] < samples[0, 1, -1]).int()


def context_of_neighbour(samples):
    samples[:, 0] = samples[:, 0].roll(1, dims=1)


def first_of_batch(samples):
    samples[:] = samples[:1].clone()


def last_of_batch(samples):
    samples[:] = samples[-1:].clone()


WRONG = {
    causal: "the earlier context must see token",
    full: "another sample of the pack must not see token",
    unpacked: "another sample of the pack must not see token",
    context_too_long: "the context must not see token",
    context_too_short: "the earlier context must see token",
    boundary_shifted: "must",
    context_of_neighbour: "must",
}


def wrong_attention(distort, query, key, value, samples):
    samples = samples.clone()
    distort(samples)
    return reference(query, key, value, samples)


@pytest.mark.parametrize("dropout_probability", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["auto", *backends_of("cpu")])
def test_every_backend_passes(name, dtype, dropout_probability):
    for batch in (1, 2):
        check_backend(SETUP._replace(
            backend=name, batch=batch, dropout_probability=dropout_probability, dtype=dtype
        ))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_passes_uncompiled():
    attention = partial(load_backend("flex"), softmax_scale=0.25)
    check_attention(attention, SETUP)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout_probability", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["auto", *backends_of("cuda")])
def test_every_backend_passes_on_gpu(name, dtype, dropout_probability):
    skip_without_library(name)
    if name in NO_DROPOUT and dropout_probability:
        pytest.skip("has no dropout")
    check_backend(SETUP._replace(
        backend=name, batch=2, seq_length=1000, dim=64, dropout_probability=dropout_probability,
        dtype=dtype, device=torch.device("cuda"),
    ))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distort", WRONG, ids=lambda distort: distort.__name__)
def test_a_wrong_mask_is_named(distort, dtype, batch):
    with pytest.raises(MaskConformanceError) as error:
        check_attention(
            partial(wrong_attention, distort),
            SETUP._replace(backend="skewed", batch=batch, dtype=dtype),
        )
    message = str(error.value)
    assert message.startswith("attention backend skewed breaks GLM's mask: ")
    assert WRONG[distort] in message
    assert "but row" in message


def test_the_positions_of_a_violation():
    with pytest.raises(MaskConformanceError, match=(
        r"the context must not see token 35, target of the sample \[0, 59\) with context end 35, "
        r"but rows 0 to 34 \(35 in all\) did"
    )):
        check_attention(partial(wrong_attention, context_too_long), SETUP)


def test_a_mask_of_another_sequence_of_the_batch():
    for distort in (first_of_batch, last_of_batch):
        with pytest.raises(MaskConformanceError):
            check_attention(partial(wrong_attention, distort), SETUP._replace(batch=2))


def test_attention_is_asked_as_training_asks_it():
    """With gradients, and slices of a projection that is contiguous: what a compiler keys on."""
    def attention(query, key, value, samples):
        for x in (query, key, value):
            assert x.requires_grad and torch.is_grad_enabled()
            assert x.stride() == (2 * 2 * 48, 2 * 48, 48, 1)
        return reference(query, key, value, samples)

    check_attention(attention, SETUP._replace(batch=2))


def leak_across_sequences(query, key, value, samples):
    return reference(query, key, value + 1e-2 * value.roll(1, dims=1), samples)


def test_a_leak_across_sequences():
    with pytest.raises(MaskConformanceError, match="another sequence of the batch must not see"):
        check_attention(leak_across_sequences, SETUP._replace(batch=2, dtype=torch.bfloat16))


def test_a_leak_smaller_than_any_plausible_loss_difference():
    def leaky(query, key, value, samples):
        out = reference(query, key, value, samples)
        out[:-1] += 1e-3 * value[1:].flatten(2)
        return out

    with pytest.raises(MaskConformanceError):
        check_attention(leaky, SETUP._replace(dtype=torch.bfloat16))


def test_not_a_number_is_named():
    def broken(query, key, value, samples):
        return reference(query, key, value, samples) * float("nan")

    with pytest.raises(MaskConformanceError, match="must be finite"):
        check_attention(broken, SETUP)


def test_noise_of_the_kernel_is_no_leak():
    def noisy(query, key, value, samples):
        out = reference(query, key, value, samples)
        return out + torch.empty_like(out).uniform_(-1e-6, 1e-6)

    check_attention(noisy, SETUP)


class TwoLayers(torch.nn.Module):
    """A small post-norm transformer whose attention is any function."""

    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(50, 32)
        self.mixed = torch.nn.ModuleList([torch.nn.Linear(32, 96) for _ in range(2)])
        self.attention = attention

    def forward(self, tokens, position_ids, samples):
        x = self.embedding(tokens).transpose(0, 1)
        x = x + torch.sin(position_ids.t()[..., None] * torch.arange(1, 33) / 32)
        for mixed in self.mixed:
            heads = mixed(x).view(*x.shape[:2], 2, 48).split(16, dim=-1)
            x = torch.nn.functional.layer_norm(2 * x + self.attention(*heads, samples), (32,))
        return (x @ self.embedding.weight.t()).transpose(0, 1)


MODEL = {"name": "model", "batch": 2, "seq_length": 64, "vocab_size": 50, "max_samples": 8,
         "device": torch.device("cpu")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_whole_model_passes(dtype):
    def attention(*arguments):
        *heads, samples = arguments
        return reference(*(x.to(dtype) for x in heads), samples).float()

    check_model(TwoLayers(attention), **MODEL)


@pytest.mark.parametrize("distort", WRONG, ids=lambda distort: distort.__name__)
def test_a_whole_model_with_a_wrong_mask_is_named(distort):
    with pytest.raises(MaskConformanceError, match="model breaks GLM's mask: "):
        check_model(TwoLayers(partial(wrong_attention, distort)), **MODEL)


@pytest.mark.parametrize("max_samples", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("seq_length", [16, 17, 64, 2048])
def test_probed_packs_are_valid(seq_length, max_samples):
    for turn in range(2):
        samples = probe_samples(3, seq_length, max_samples, turn)
        assert samples.shape == (3, 2, max_samples)
        validate_samples(samples, seq_length)


def test_a_sequence_too_short_to_check():
    with pytest.raises(GLMError, match="--seq-length 8: .* 16 tokens or more"):
        check_attention(reference, SETUP._replace(seq_length=8))


def check_glm(wrong_rank, dtype):
    """Checks GLM itself on this rank's vocabulary shard of the logits; the message or None."""
    from megatron.core import parallel_state

    from megatron_glm.model.attention.core_attention import PrefixAttention
    from tests.model.building import build_glm

    (model,) = build_glm(num_layers=2, params_dtype=dtype, bf16=dtype == torch.bfloat16)
    model.to(dtype)
    if dist.get_rank() == wrong_rank:
        right = PrefixAttention.forward

        def skewed(self, query, key, value, samples, **options):
            samples = samples.clone()
            context_too_long(samples)
            return right(self, query, key, value, samples, **options)

        PrefixAttention.forward = skewed
    model.eval()
    try:
        check_model(model, name="GLM", batch=2, seq_length=64, vocab_size=512, max_samples=4,
                    device=torch.device("cpu"),
                    group=parallel_state.get_tensor_model_parallel_group())
    except MaskConformanceError as error:
        return str(error)
    return None


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_glm_under_tensor_parallelism(dtype):
    layout = {"tensor_model_parallel_size": 2}
    assert run_ranks(check_glm, None, dtype, **layout) == [None, None]
    for message in run_ranks(check_glm, 1, dtype, **layout):
        assert "the context must not see token" in message


def wrong_on_one_rank():
    attention = partial(wrong_attention, causal) if dist.get_rank() == 1 else reference
    try:
        check_attention(attention, SETUP, dist.group.WORLD)
    except MaskConformanceError as error:
        return str(error)
    return None


@pytest.mark.ranks
def test_all_ranks_refuse_when_one_is_wrong():
    first, second = run_ranks(wrong_on_one_rank)
    assert first == second
    assert "rank 1: the earlier context must see" in first
