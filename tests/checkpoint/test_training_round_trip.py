"""A run at TP 2 x PP 2 goes out, comes back with the same bits, and training goes on."""

from pathlib import Path

import pytest
import torch

from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.formats import open_checkpoint
from megatron_glm.checkpoint.table import Format
from megatron_glm.checkpoint.target import Request, plan_target
from tests.checkpoint.building import assert_same_bits, read_all, remote_code_in
from tests.ranks import run_ranks
from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, pretrain

pytestmark = pytest.mark.ranks
STEPS = 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """20 steps at TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("run")
    flags = [*TINY, *corpus.flags, "--train-iters", str(STEPS), "--save", str(folder),
             "--save-interval", str(STEPS), "--tensor-model-parallel-size", "2",
             "--pipeline-model-parallel-size", "2"]  # fmt: skip
    pretrain(flags, world_size=4)
    return folder


def convert(source, fmt: Format, folder: Path, **options) -> Path:
    target = plan_target(Request(fmt, **options), source, source.settings, None)
    folder.mkdir()
    conversion = Conversion(source, target.dtype, target.bits, target.scales)
    target.write(folder, conversion)
    conversion.finish()
    return folder


def verified(*arguments: str) -> int:
    """Exit status of tools/verify_checkpoint.py."""
    from tools import verify_checkpoint

    with pytest.raises(SystemExit) as status:
        verify_checkpoint.main(list(arguments))
    return status.value.code


@pytest.fixture(scope="module")
def exports(run, tmp_path_factory) -> dict[Format, Path]:
    folder, source = tmp_path_factory.mktemp("exports"), open_checkpoint(run)
    assert source.iteration == STEPS
    return {
        Format.SAT: convert(source, Format.SAT, folder / "sat", target_tp=4, dtype=torch.float32),
        Format.HUGGING_FACE: convert(source, Format.HUGGING_FACE, folder / "hf"),
    }


def verify_on_one_rank(modules: Path, *arguments: str) -> int:
    with remote_code_in(modules):
        return verified(*arguments)


@pytest.mark.parametrize("fmt", [Format.SAT, Format.HUGGING_FACE])
def test_exports_have_the_logits_of_the_run(run, exports, fmt, tmp_path):
    # A SAT file does not say how its weights were trained.
    angles = ["--rotary-angle-dtype", "fp32"]
    status = run_ranks(
        verify_on_one_rank, tmp_path, "--load", str(run), "--against", str(exports[fmt]), *angles,
        world_size=1, initialize=False,
    )  # fmt: skip
    assert status == [0]


@pytest.mark.parametrize("fmt", [Format.SAT, Format.HUGGING_FACE])
def test_exports_come_back_with_the_same_bits_and_training_goes_on(
    run, exports, corpus, fmt, tmp_path
):
    source = open_checkpoint(exports[fmt])
    known = open_checkpoint(run).settings
    source.settings = known
    back = convert(source, Format.MEGATRON, tmp_path / "back")
    assert_same_bits(read_all(open_checkpoint(back)), read_all(open_checkpoint(run)))
    steps = pretrain(
        [*TINY, *corpus.flags, "--train-iters", "3", "--load", str(back),
         "--tensor-model-parallel-size", "2", "--use-distributed-optimizer"],
        world_size=2,
    )  # fmt: skip
    trained = [step.losses["lm loss"] for step in steps]
    # From scratch it starts at ln(vocabulary) = 5.9.
    assert len(trained) == 3
    assert trained[0] < 5.6


def test_an_iteration_is_continued_where_it_was(run, corpus, tmp_path):
    back = convert(open_checkpoint(run), Format.MEGATRON, tmp_path / "back", iteration=STEPS)
    steps = pretrain(
        [*TINY, *corpus.flags, "--train-iters", str(STEPS + 1), "--load", str(back),
         "--no-load-optim", "--no-load-rng"],
    )  # fmt: skip
    assert len(steps) == 1
