"""A loss or a gradient that is not a number ends the run."""

import math

import pytest
import torch

from megatron_glm.training.divergence import DivergenceError, check_step

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("loss, grad_norm, found", [
    (NAN, NAN, "NaN in the loss of iteration 7"),
    (INF, 1.0, "Inf in the loss of iteration 7"),
    (0.0, NAN, "NaN in the gradient of iteration 7"),
    (2.0, INF, "Inf in the gradient of iteration 7"),
])
def test_what_was_found_is_said_with_the_cure(loss, grad_norm, found):
    with pytest.raises(DivergenceError, match=f"found {found}; .*resume from it") as error:
        check_step(7, {"lm loss": torch.tensor(loss)}, grad_norm)
    # The first rank speaks for all where all see the same.
    assert error.value.is_everywhere == (not math.isfinite(grad_norm))


@pytest.mark.parametrize("loss, grad_norm", [(2.0, 1.0), (0.0, 0.0), (2.0, None)])
def test_numbers_and_skipped_steps_pass(loss, grad_norm):
    check_step(7, {"lm loss": torch.tensor(loss)}, grad_norm)


def test_a_stage_without_a_loss_looks_at_the_gradient():
    check_step(7, {}, 1.0)
    with pytest.raises(DivergenceError, match="NaN in the gradient"):
        check_step(7, {}, NAN)
