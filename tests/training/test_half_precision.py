"""Half precision trains as fp32 does, from the first step."""

import pytest

from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain, with_fixed_weights

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def single_precision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half_precision")
    flags = [*TINY, *make_corpus(folder).flags, "--train-iters", "10"]
    flags = with_fixed_weights(flags, str(folder / "weights"))
    return flags, pretrain(flags)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_no_step_is_skipped_and_losses_follow_fp32(single_precision, dtype):
    flags, expected = single_precision
    steps = pretrain([*flags, f"--{dtype}"])
    for step, reference in zip(steps, expected, strict=True):
        # A skipped step has no losses.
        assert step.losses["lm loss"] == pytest.approx(reference.losses["lm loss"], rel=2e-3)
    assert steps[-1].grad_norm == pytest.approx(expected[-1].grad_norm, rel=0.05)
