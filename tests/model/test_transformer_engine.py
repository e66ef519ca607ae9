"""A GLM made of Transformer Engine's linears is the GLM made of Megatron's own.

On the CPU all of Transformer Engine runs but its kernels, for which torch stands in: what is shown
is everything around them. The numbers of the kernels are compared on a GPU.
"""

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from tests.model.building import build_glm, sample_bounds
from tests.ranks import run_ranks
from tests.training.stepping import Stepping
from tests.transformer_engine import emulated, needs_transformer_engine  # noqa: F401

pytestmark = needs_transformer_engine
IMPLEMENTATIONS = ("local", "transformer_engine")
ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel",
              "allreduce", "shared", "shared_embedding")  # fmt: skip
TP2 = {"tensor_model_parallel_size": 2}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}


def build(implementation: str, **options):
    """A model whose weights depend on the seed alone."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    (glm,) = build_glm(transformer_impl=implementation, **options)
    return glm


def loss_and_gradients(glm, seq_length: int = 96) -> dict[str, torch.Tensor]:
    """The losses [b, s] of two packed sequences and the gradient of each weight, fp32 on the
    CPU."""
    device = next(glm.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(512, (2, seq_length), generator=generator).to(device)
    position_ids = torch.arange(seq_length, device=device).expand(2, -1)
    samples = [[[0, seq_length // 3, seq_length]], [[0, 10, seq_length]]]
    losses = glm(tokens, position_ids, sample_bounds(samples, seq_length).to(device), labels=tokens)
    losses.float().mean().backward()
    found = {name: weight.grad for name, weight in glm.named_parameters()}
    return {name: x.detach().float().cpu() for name, x in (found | {"losses": losses}).items()}


def both_on_this_rank(options: dict) -> list:
    """By implementation: weights, their marks for parallelism, losses and gradients."""
    found = []
    for implementation in IMPLEMENTATIONS:
        glm = build(implementation, **options)
        kind = type(glm.decoder.layers[0].mlp.linear_fc1).__name__
        assert kind.startswith("TE") == (implementation == "transformer_engine"), kind
        weights = {name: weight.detach().clone() for name, weight in glm.named_parameters()}
        marks = {
            name: {key: getattr(weight, key, None) for key in ATTRIBUTES}
            for name, weight in glm.named_parameters()
        }
        found.append((weights, marks, loss_and_gradients(glm)))
    return found


@pytest.mark.ranks
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("layout, options", [
    pytest.param({}, {}, id="one rank"),
    pytest.param({}, {"hidden_dropout": 0.1, "attention_dropout": 0.1}, id="dropout"),
    pytest.param({}, FULL, id="full recomputation"),
    pytest.param({}, SELECTIVE, id="selective recomputation"),
    pytest.param(TP2, {}, id="tp 2"),
    pytest.param(TP2, {"sequence_parallel": True}, id="tp 2 with sequence parallelism"),
])
def test_weights_losses_and_gradients_are_those_of_the_local_linears(layout, options):
    world_size = 2 if layout else 1
    for local, engine in run_ranks(both_on_this_rank, options, world_size=world_size, **layout):
        assert_same_bits(engine[0], local[0])
        assert engine[1] == local[1]
        for name, gradient in local[2].items():
            torch.testing.assert_close(engine[2][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def steps_by_both(options: dict) -> list:
    """Losses and gradient norms of four steps of two micro-batches, by implementation."""
    found = []
    for implementation in IMPLEMENTATIONS:
        tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
        run = Stepping(transformer_impl=implementation, **options)
        norms = [float(run.step()[1]) for _ in range(4)]
        weights = [weight for name, weight in run.model.named_parameters() if "linear" in name]
        fused = {getattr(weight, "grad_added_to_main_grad", False) for weight in weights}
        found.append((run.losses, norms, fused))
    return found


@pytest.mark.ranks
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 1e-3)])
def test_weight_gradients_added_in_the_products_train_as_the_local_ones(dtype, tolerance):
    options = {"dtype": dtype, "gradient_accumulation_fusion": True, "distributed": True}
    for local, engine in run_ranks(steps_by_both, options, world_size=2):
        assert local[2] == engine[2] == {True, False}
        assert engine[0] == pytest.approx(local[0], rel=tolerance)
        assert engine[1] == pytest.approx(local[1], rel=10 * tolerance)


@pytest.fixture(scope="module")
def one_gpu():
    """This process as the only rank of a job."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def errors_in_half_precision(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """By implementation: how far losses and gradients are, relative to their size, from those in
    fp32 of the same weights, by the local linears and plain attention."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    sizes = {"hidden_size": 512, "ffn_hidden_size": 1408, "num_attention_heads": 8,
             "seq_length": 512}  # fmt: skip
    half = sizes | {name: True, "params_dtype": dtype, "pipeline_dtype": dtype}
    models = {implementation: build(implementation, **half) for implementation in IMPLEMENTATIONS}
    exact = build("local", **sizes, glm_fused_kernels=False, glm_attention_backend="reference")
    exact.load_state_dict(models["local"].state_dict())
    assert_same_bits(*(dict(glm.named_parameters()) for glm in models.values()))
    expected = loss_and_gradients(exact, sizes["seq_length"])
    errors = {}
    for implementation, glm in models.items():
        found = loss_and_gradients(glm, sizes["seq_length"])
        errors[implementation] = {
            name: ((found[name] - value).norm() / value.norm()).item()
            for name, value in expected.items()
        }
    return errors


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("dtype, unit", [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_kernels_round_as_the_local_ones_do(dtype, unit):
    errors = errors_in_half_precision(dtype)
    for name, local in errors["local"].items():
        assert errors["transformer_engine"][name] <= 1.5 * local + unit, name


@pytest.mark.gpu
@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("fusion", [False, True])
def test_steps_on_a_gpu_are_those_of_the_local_linears(fusion):
    options = {"dtype": "bf16", "gradient_accumulation_fusion": fusion, "distributed": True}
    local, engine = steps_by_both(options)
    assert engine[0] == pytest.approx(local[0], rel=1e-3)
    assert engine[1] == pytest.approx(local[1], rel=2e-2)


def assert_same_bits(ours: dict, theirs: dict) -> None:
    """Names, shapes and values of two sets of tensors are the same."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
