"""Norms and GeGLU made again for the backward pass: the same bits, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_glm.errors import GLMError
from megatron_glm.model.recomputation import apply_linear, give_recipe
from tests.model.building import build_glm
from tests.ranks import run_ranks

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VP = "virtual_pipeline_model_parallel_size"
MICRO_BATCHES, SEQUENCE = 4, 24
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}


class Product(torch.autograd.Function):
    """A linear that keeps its input, or a copy of it."""

    @staticmethod
    def forward(ctx, x, weight, copies):
        ctx.save_for_backward(x.clone() if copies else x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2), None


def doubled_through_a_linear(copies: bool = False):
    """x, doubled, and a linear's output of that, with a recipe; weight."""
    x, weight = torch.randn(3, 2, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    y = 2 * x
    give_recipe(y, lambda: 2 * x)
    # As Megatron's: an alias goes in, another operation comes behind.
    output, _ = apply_linear(lambda y: (Product.apply(y.view_as(y), weight, copies) + 1, None), y)
    return x, weight, y, output


@pytest.fixture
def no_garbage_collection():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
def test_an_input_goes_with_its_last_reader_and_comes_back_for_the_backward_pass():
    x, weight, y, output = doubled_through_a_linear()
    memory, reader = weakref.ref(y.untyped_storage()), y.detach()
    del y
    assert memory() is not None
    del reader
    assert memory() is None
    output.sum().backward()
    ones = torch.ones(3, 2, 5)
    assert torch.equal(x.grad, 2 * (ones @ weight.t()))
    assert torch.equal(weight.grad, (2 * x).flatten(0, 1).t() @ ones.flatten(0, 1))


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("with_backward", [True, False])
def test_a_recipe_ends_with_its_use(with_backward):
    *_, y, output = doubled_through_a_linear()
    recipe = weakref.ref(y.recipe)
    del y
    assert recipe() is not None
    if with_backward:
        output.sum().backward()
    else:
        del output
    assert recipe() is None


def test_a_linear_that_keeps_a_copy_is_refused():
    with pytest.raises(GLMError, match="--glm-recompute-norms-and-geglu: a linear does not keep"):
        doubled_through_a_linear(copies=True)


def test_without_gradients_nothing_is_asked_of_the_linear():
    with torch.no_grad():
        *_, output = doubled_through_a_linear(copies=True)
    assert not output.requires_grad


def train(options: dict, recomputes: bool) -> dict[str, torch.Tensor]:
    """Losses of the micro-batches of a step and of one in evaluation, and gradients."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    chunks = build_glm(
        vocab_size=64, seq_length=SEQUENCE, gradient_accumulation_fusion=True,
        calculate_per_token_loss=True, glm_recompute_norms_and_geglu=recomputes, **options,
    )  # fmt: skip
    wrapping = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    wrapped = [DistributedDataParallel(chunk.config, wrapping, chunk) for chunk in chunks]
    tokens = torch.arange(MICRO_BATCHES * 2 * SEQUENCE).view(-1, 2, SEQUENCE) * 7 % 64
    samples = torch.tensor([[[9], [SEQUENCE]], [[0], [SEQUENCE]]], dtype=torch.int32)
    positions = torch.arange(SEQUENCE).expand(2, -1)

    def forward_step(batches, model):
        ids = next(batches)
        losses = model(ids, positions, samples, labels=ids.roll(1, 1))
        count = torch.tensor(ids.numel(), dtype=torch.int)
        return losses, lambda out: (out.sum(), count, {"losses": out.detach()})

    def losses(forward_only: bool) -> list[torch.Tensor]:
        batches = [iter(tokens) for _ in wrapped]
        report = get_forward_backward_func()(
            forward_step_func=forward_step, model=wrapped if len(wrapped) > 1 else wrapped[0],
            data_iterator=batches if len(batches) > 1 else batches[0],
            num_microbatches=MICRO_BATCHES, seq_length=SEQUENCE, micro_batch_size=2,
            forward_only=forward_only,
        )  # fmt: skip
        return [part["losses"] for part in report]

    found = {f"losses {n}": value for n, value in enumerate(losses(False))}
    for n, chunk in enumerate(wrapped):
        chunk.finish_grad_sync()
        found |= {f"{n} {name}": weight.main_grad for name, weight in chunk.named_parameters()}
        chunk.eval()
    with torch.no_grad():
        return found | {f"evaluation {n}": value for n, value in enumerate(losses(True))}


def differences(options: dict) -> tuple[int, list[str]]:
    """How many tensors a step with recomputation gives, and which differ from those without."""
    plain, again = train(options, False), train(options, True)
    assert plain.keys() == again.keys()
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        assert "losses 3" in plain and "evaluation 3" in plain
    return len(plain), [name for name in plain if not torch.equal(plain[name], again[name])]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout, options",
    [
        pytest.param({}, {}, id="one rank"),
        pytest.param({}, MLP, id="beside recomputed MLPs"),
        pytest.param({TP: 2}, {}, id="tp 2"),
        pytest.param({TP: 2}, {"sequence_parallel": True}, id="tp 2, sequence parallel"),
        pytest.param({PP: 2}, {}, id="pp 2"),
        pytest.param({PP: 2, VP: 2}, {}, id="pp 2, interleaved"),
    ],
)
def test_losses_and_gradients_are_the_same_bits(layout, options):
    options = {"hidden_dropout": 0.2, "attention_dropout": 0.1} | options
    for number, differing in run_ranks(
        differences, options, world_size=max(layout.get(TP, 1), layout.get(PP, 1)), **layout
    ):
        assert number > 20 and not differing
