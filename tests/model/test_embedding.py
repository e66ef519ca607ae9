"""The schedule of the embedding gradient shrink, and its exactness at every layout."""

import pytest

from megatron_glm.model.config import GLMArchitecture
from megatron_glm.model.embedding import shrink_alpha


def test_constant_without_a_ramp():
    config = GLMArchitecture(shrink_embedding_gradient_alpha=0.1)
    assert [shrink_alpha(config, n) for n in (0, 10**9)] == [0.1, 0.1]


def test_linear_ramp_in_samples():
    config = GLMArchitecture(
        shrink_embedding_gradient_alpha=0.1,
        shrink_embedding_gradient_initial_alpha=1.0,
        shrink_embedding_gradient_ramp_start_samples=100,
        shrink_embedding_gradient_ramp_samples=200,
    )
    alphas = [shrink_alpha(config, n) for n in (0, 99, 100, 200, 300, 301)]
    assert alphas == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1, 0.1])


def test_a_ramp_of_no_samples_is_a_step():
    config = GLMArchitecture(
        shrink_embedding_gradient_alpha=0.1, shrink_embedding_gradient_initial_alpha=0.5,
        shrink_embedding_gradient_ramp_start_samples=10,
    )
    assert [shrink_alpha(config, n) for n in (9, 10)] == [0.5, 0.1]


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.5, float("nan")])
def test_a_factor_outside_its_range_names_the_flag(alpha):
    with pytest.raises(ValueError, match="--shrink-embedding-gradient-alpha"):
        GLMArchitecture(shrink_embedding_gradient_alpha=alpha)
