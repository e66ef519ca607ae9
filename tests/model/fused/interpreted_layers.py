"""A whole model of fused kernels under Triton's interpreter, against torch's operations."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton
import tests.conftest  # noqa: F401  patches, before anything imports Megatron

from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel

from megatron_glm.model import glm_model
from megatron_glm.model.attention import conformance as mask_conformance
from megatron_glm.model.attention import core_attention, flex
from megatron_glm.model.dropout import draw_dropout, drop_channels
from megatron_glm.model.fused import conformance, geglu, residual_norm, rotary, selection
from tests.model.attention.compiled_flex import compiled_flex
from tests.model.building import build_glm

SAMPLES = torch.tensor([[[10, 3], [16, 24]], [[0, 5], [9, 24]]], dtype=torch.int32)


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def dropout_by_hash(monkeypatch):
    """Megatron's dropout drops what the kernels drop."""
    def dropout(x, p=0.5, training=True, inplace=False):
        return drop_channels(x, draw_dropout(p if training else 0.0, x.device))

    monkeypatch.setattr(F, "dropout", dropout)


def count_calls(monkeypatch) -> Counter:
    """How often each fused operation is called from now on."""
    calls = Counter()

    def counted(function):
        def call(*arguments):
            calls[function.__name__] += 1
            return function(*arguments)

        return call

    for module, name in ((residual_norm, "residual_norm"), (residual_norm, "layer_norm"),
                         (residual_norm, "residual_sum"), (geglu, "bias_geglu"),
                         (rotary, "rotate_query_key_")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    return calls


def run(is_training: bool, **options) -> dict[str, torch.Tensor]:
    """Per-token losses [b, s] and, of a model that trains, the gradient of every parameter."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    (model,) = build_glm(num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=2,
                         vocab_size=64, seq_length=24, hidden_dropout=0.2, **options)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases of 0 and norms of 1 hide what is left out
            torch.nn.init.normal_(parameter, mean=parameter.flatten()[0].item(), std=0.3)
    model.train(is_training)
    tokens = torch.arange(48).view(2, 24)
    positions = torch.arange(24).expand(2, -1)
    losses = model(tokens, positions, SAMPLES, labels=tokens.flip(1))
    found = {"losses": losses.detach()}
    if is_training:
        losses.sum().backward()
        found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return found


@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
def test_a_model_of_kernels_is_the_model_of_torch(is_training, monkeypatch):
    monkeypatch.setattr(selection, "DEVICES", ("cpu",))
    calls = count_calls(monkeypatch)
    exact = run(is_training, glm_fused_kernels=False)
    assert not calls
    actual = run(is_training)
    assert calls == {"residual_norm": 2, "layer_norm": 2, "residual_sum": 2, "bias_geglu": 2,
                     "rotate_query_key_": 2}  # fmt: skip
    for name, value in exact.items():
        error = (actual[name] - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), name


def test_kernels_make_norms_and_geglu_again(monkeypatch):
    monkeypatch.setattr(selection, "DEVICES", ("cpu",))
    exact = run(True)
    calls = count_calls(monkeypatch)
    actual = run(True, glm_recompute_norms_and_geglu=True)
    assert calls == {"residual_norm": 2, "layer_norm": 2 + 4, "residual_sum": 2,
                     "bias_geglu": 2 + 2, "rotate_query_key_": 2}  # fmt: skip
    assert all(torch.equal(actual[name], value) for name, value in exact.items())


@pytest.mark.parametrize("dropout, num_graphs", [(0.0, 1), (0.1, 2)])
def test_checks_compile_the_attention_that_trains(dropout, num_graphs, monkeypatch):
    """And no more, for one shape alone, whatever the micro-batches of evaluation are."""
    monkeypatch.setattr(selection, "DEVICES", ("cpu",))
    monkeypatch.setattr(glm_model, "DEVICES", ("cpu",))
    monkeypatch.setattr(conformance, "NUM_TOKENS", 4)
    for module in (core_attention, mask_conformance, conformance):
        monkeypatch.setattr(module, "select_backend", lambda *_: flex.attention)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    # With heads of 8, 1 / sqrt(d) is not d ** -0.5, and a scale is compiled into a kernel.
    (model,) = build_glm(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2,
                         vocab_size=16, seq_length=16, attention_dropout=dropout,
                         glm_attention_backend="flex")  # fmt: skip

    def attend(batch):
        positions = torch.arange(16).expand(batch, -1)
        samples = torch.tensor([[[5, 2], [10, 16]]], dtype=torch.int32).expand(batch, -1, -1)
        return model.decoder.layers[0].self_attention(
            torch.randn(16, batch, 16), samples, rotary_pos_emb=model.rotary_table(positions)
        )[0]

    with compiled_flex(monkeypatch) as graphs:
        for check in (glm_model.check_mask_conformance, glm_model.check_kernel_conformance):
            check([model], micro_batch_size=2, seq_length=16, max_samples=2)
            assert len(graphs) == num_graphs
        attend(2).sum().backward()
        assert len(graphs) == num_graphs
        model.eval()
        with torch.no_grad():
            for batch in (2, 3):
                attend(batch)
        model.train()
        attend(2).sum().backward()
        assert graphs == [True] * (num_graphs + 2)
