"""The embedding gradient shrink is exact at every layout and leaves the forward alone."""

import numpy as np
import pytest
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from tests.model.building import build_glm, forward_logits
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
SEQUENCE, VOCABULARY = 24, 128


def tied_gradients(alpha: float) -> dict[str, np.ndarray]:
    """Gradients of this rank's copies of the tied weight, another weight's, and the logits."""
    (model,) = build_glm(vocab_size=VOCABULARY, seq_length=SEQUENCE,
                         shrink_embedding_gradient_alpha=alpha)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)
    position_ids = torch.arange(SEQUENCE).expand(2, -1)
    samples = torch.tensor([[[9], [SEQUENCE]]], dtype=torch.int32).expand(2, -1, -1)

    def forward_step(data_iterator, model):
        losses = model(tokens, position_ids, samples, labels=tokens)
        return losses, lambda output: (output.mean(), {"loss": output.detach().mean()})

    get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=None, model=model, num_microbatches=1,
        seq_length=SEQUENCE, micro_batch_size=2, forward_only=False,
    )
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if name in ("embedding.word_embeddings.weight", "output_layer.weight")
        or name.endswith("layers.0.mlp.linear_fc2.weight")
    }
    with torch.no_grad():
        logits = forward_logits([model], tokens, position_ids, samples)
    return gradients | ({} if logits is None else {"logits": logits.numpy()})


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_gradient_is_exactly_alpha_of_the_one_without(tp, pp):
    layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    plain, shrunk = (
        run_ranks(tied_gradients, alpha, world_size=tp * pp, **layout) for alpha in (1.0, 0.1)
    )
    tied = set()
    for without, with_shrink in zip(plain, shrunk, strict=True):
        assert without.keys() == with_shrink.keys()
        for name, expected in without.items():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                tied.add(name)
                assert np.abs(expected).max() > 0
                expected = expected * np.float32(0.1)
            np.testing.assert_array_equal(with_shrink[name], expected, err_msg=name)
    assert tied == {"embedding.word_embeddings.weight"} | (
        {"output_layer.weight"} if pp > 1 else set()
    )
