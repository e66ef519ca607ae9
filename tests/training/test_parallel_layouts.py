"""Every parallel layout trains the same model as one rank, from the same weights and data."""

import pytest

from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain, with_fixed_weights

pytestmark = pytest.mark.ranks
NUM_STEPS = 20
TP2 = ["--tensor-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", "1"]  # fmt: skip
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "core_attn", "mlp"]
LAYOUTS = {
    "tp 2": (2, TP2),
    "tp 2, sequence parallel": (2, [*TP2, "--sequence-parallel"]),
    "pp 2": (2, PP2),
    "pp 2, interleaved": (2, [*PP2, "--num-layers-per-virtual-pipeline-stage", "1"]),
    "tp 2 x pp 2": (4, [*TP2, *PP2]),
    "dp 2": (2, []),
    "dp 2, distributed optimizer": (2, ["--use-distributed-optimizer"]),
    "full recomputation": (1, FULL),
    "selective recomputation": (1, SELECTIVE),
    "micro-batches of one": (1, ["--micro-batch-size", "1"]),
    "unfused weight gradients": (1, ["--no-gradient-accumulation-fusion"]),
    "tp 2 x pp 2, everything": (4, [*TP2, *PP2, "--sequence-parallel", *FULL]),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Flags that start from one set of weights, and the steps of one rank from there."""
    folder = tmp_path_factory.mktemp("layouts")
    corpus = make_corpus(folder)
    flags = [*TINY, *corpus.flags, "--train-iters", str(NUM_STEPS)]
    flags = with_fixed_weights(flags, str(folder / "weights"))
    steps = pretrain(flags)
    assert len(steps) == NUM_STEPS
    return flags, steps


def assert_same_steps(steps, expected, relative):
    for index, (step, reference) in enumerate(zip(steps, expected, strict=True)):
        assert step.losses.keys() == reference.losses.keys()
        for name, loss in reference.losses.items():
            assert step.losses[name] == pytest.approx(loss, rel=relative), (index, name)
        assert step.grad_norm == pytest.approx(reference.grad_norm, rel=relative), index


def test_one_rank_learns(start):
    _, steps = start
    assert steps[-1].losses["lm loss"] < 0.9 * steps[0].losses["lm loss"]
    assert {"lm loss", "lm loss [MASK]", "lm loss [gMASK]"} <= steps[0].losses.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(start, name):
    flags, expected = start
    world_size, layout = LAYOUTS[name]
    assert_same_steps(pretrain([*flags, *layout], world_size), expected, relative=1e-5)


@pytest.mark.parametrize("recomputation", [FULL, SELECTIVE], ids=["full", "selective"])
def test_recomputation_draws_the_same_dropout(start, recomputation):
    flags, _ = start
    flags = [*flags, "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--train-iters", "8"]
    assert pretrain([*flags, *recomputation]) == pretrain(flags)
