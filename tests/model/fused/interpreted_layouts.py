"""A model of fused kernels, under Triton's interpreter, in every layout and with recomputation.

Against the same model of torch's operations on the same ranks.
"""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_glm.model.fused import selection
from tests.model.building import build_glm
from tests.ranks import run_ranks

SEQUENCE, BATCH, VOCABULARY = 16, 2, 64
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
INTERLEAVED = {PP: 2, "virtual_pipeline_model_parallel_size": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def step(chunks, num_microbatches):
    """Losses of the last stage and this rank's gradients, after one step of training."""
    torch.manual_seed(1)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
    # One [MASK] at 3 whose five tokens repeat its position, and a second sample of the pack.
    position_ids = torch.tensor([*range(5), *[3] * 5, *range(6)]).expand(BATCH, -1)
    samples = torch.tensor([[[5, 2], [10, SEQUENCE]]], dtype=torch.int32).expand(BATCH, -1, -1)
    losses = []

    def forward_step(data_iterator, model):
        output = model(tokens, position_ids, samples, labels=tokens.flip(1))

        def loss(output):
            losses.append(output.detach().clone())
            return (output * (position_ids == 3)).sum(), {}

        return output, loss

    for chunk in chunks:
        chunk.zero_grad()
    is_interleaved = len(chunks) > 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[None] * len(chunks) if is_interleaved else None,
        model=chunks if is_interleaved else chunks[0],
        num_microbatches=num_microbatches, seq_length=SEQUENCE, micro_batch_size=BATCH,
        forward_only=False,
    )
    gradients = {
        f"{index}.{name}": parameter.grad.clone()
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    return gradients | {f"losses {index}": value for index, value in enumerate(losses)}


def compare(recomputations, sequence_parallel):
    """Largest error of anything against the largest of its kind, by recomputation."""
    errors = []
    num_layers = 4 if parallel_state.get_pipeline_model_parallel_world_size() > 1 else 2
    for options in recomputations:
        chunks = build_glm(
            num_layers=num_layers, hidden_size=32, ffn_hidden_size=40, num_attention_heads=2,
            vocab_size=VOCABULARY, seq_length=SEQUENCE, sequence_parallel=sequence_parallel,
            **options,
        )
        assert not any("rotary" in name for chunk in chunks for name in chunk.state_dict())
        torch.manual_seed(0)
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            if parameter.dim() == 1:  # biases of 0 hide what is left out
                parameter.data += 0.1 * torch.randn(len(parameter))
        num_microbatches = parallel_state.get_pipeline_model_parallel_world_size()
        results = []
        for devices in (("cuda",), ("cpu",)):
            selection.DEVICES = devices
            results.append(step(chunks, num_microbatches))
        torchs, kernels = results
        assert torchs.keys() == kernels.keys()
        # Equal to the last bit would mean that no kernel ran.
        assert any(not torch.equal(torchs[name], kernels[name]) for name in torchs)
        errors.append(
            max(
                ((kernels[name] - value).abs().max() / value.abs().max()).item()
                for name, value in torchs.items() if value.abs().max() > 0
            )
        )
    return errors


@pytest.mark.parametrize(
    "layout, recomputations, sequence_parallel",
    [
        ({}, [{}, SELECTIVE, FULL], False),
        ({TP: 2}, [SELECTIVE], True),
        (INTERLEAVED, [FULL], False),
    ],
    ids=["one rank", "tp 2 with sequence parallelism", "pp 2 interleaved"],
)
def test_kernels_train_the_model_that_torch_trains(layout, recomputations, sequence_parallel):
    size = layout.get(TP, 1) * layout.get(PP, 1)
    for errors in run_ranks(
        compare, recomputations, sequence_parallel, world_size=size, **layout
    ):
        assert max(errors) < 2e-5
