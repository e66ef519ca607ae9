"""Runs with Transformer Engine's linears and optimizer stop, go on without them, and are converted.

Its kernels are emulated on the CPU; see tests/emulated_transformer_engine.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.formats import open_checkpoint
from megatron_glm.checkpoint.table import Format
from megatron_glm.checkpoint.target import Request, plan_target
from tests.checkpoint.building import assert_same_bits, read_all
from tests.ranks import preloading
from tests.training.corpus import make_corpus
from tests.training.pretraining import TINY, Step, pretrain
from tests.transformer_engine import needs_transformer_engine

pytestmark = needs_transformer_engine
ROOT = Path(__file__).parents[2]
STOP, TOTAL = 3, 6
ENGINE = ["--transformer-impl", "transformer_engine"]
BF16 = "bf16, distributed optimizer"
KINDS = {
    BF16: ["--use-distributed-optimizer", "--bf16"],
    "fp32, distributed optimizer": ["--use-distributed-optimizer"],
    "fp32": [],
}


class Runs(NamedTuple):
    """Of one kind: the steps of a run that never stopped and of those that did, by whose linears
    and optimizer they had before and after; where each kept its checkpoint."""

    whole: list[Step]
    with_engine: list[Step]
    engine_to_local: list[Step]
    local_to_engine: list[Step]
    engine_checkpoint: Path
    local_checkpoint: Path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[str, Runs]:
    """Every run; each kind of server is started once more than once, since a start takes long."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {
        kind: [*TINY, *corpus.flags, "--train-iters", str(TOTAL), *more]
        for kind, more in KINDS.items()
    }
    local = {kind: folder / f"local {kind}" for kind in KINDS}
    engine = {kind: folder / f"engine {kind}" for kind in KINDS}
    steps: dict[str, list] = {kind: [] for kind in KINDS}
    first_local = {kind: stop(flags[kind], local[kind]) for kind in KINDS}
    with preloading("tests.emulated_transformer_engine"):
        for kind in KINDS:
            with_engine = [*flags[kind], *ENGINE]
            first = stop(with_engine, engine[kind])
            steps[kind] = [
                pretrain(with_engine),
                first + resume(with_engine, engine[kind]),
                first,
                first_local[kind] + resume(with_engine, local[kind]),
            ]
    for kind in KINDS:
        steps[kind][2] = steps[kind][2] + resume(flags[kind], engine[kind])
    return {kind: Runs(*steps[kind], engine[kind], local[kind]) for kind in KINDS}


def stop(flags: list[str], folder: Path) -> list[Step]:
    return pretrain([*flags, *saving(folder)])


def saving(folder: Path) -> list[str]:
    """Flags of a run that stops on the way."""
    return ["--save", str(folder), "--save-interval", "1000", "--exit-interval", str(STOP)]


def resume(flags: list[str], folder: Path) -> list[Step]:
    return pretrain([*flags, "--load", str(folder)])


def assert_close(steps: list[Step], expected: list[Step], tolerance: float) -> None:
    for step, other in zip(steps, expected, strict=True):
        assert step.losses == pytest.approx(other.losses, rel=tolerance)
        assert step.grad_norm == pytest.approx(other.grad_norm, rel=100 * tolerance)


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_equal(runs, kind):
    assert runs[kind].with_engine == runs[kind].whole


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_without_transformer_engine_and_back(runs, kind):
    # A step count that started anew would move the losses by 1e-3 and more.
    tolerance = 1e-4 if kind == BF16 else 1e-6
    assert_close(runs[kind].engine_to_local, runs[kind].whole, tolerance)
    assert_close(runs[kind].local_to_engine, runs[kind].whole, tolerance)


@pytest.mark.ranks
def test_both_store_the_same_tensors(runs):
    """Under the same names, and close: the optimizers round apart."""
    kind = "fp32"
    engine, local = (
        read_all(open_checkpoint(folder))
        for folder in (runs[kind].engine_checkpoint, runs[kind].local_checkpoint)
    )
    assert engine.keys() == local.keys()
    for name, tensor in engine.items():
        assert tensor.shape == local[name].shape
        assert (tensor - local[name]).abs().max() < 1e-5, name


@pytest.mark.ranks
def test_a_converted_checkpoint_is_trained_by_either(runs, corpus, tmp_path):
    source = open_checkpoint(runs["fp32"].engine_checkpoint)
    target = plan_target(Request(Format.MEGATRON), source, source.settings, None)
    folder = tmp_path / "converted"
    folder.mkdir()
    conversion = Conversion(source, target.dtype, target.bits, target.scales)
    target.write(folder, conversion)
    conversion.finish()
    assert_same_bits(read_all(open_checkpoint(folder)), read_all(source))
    flags = [*TINY, *corpus.flags, "--train-iters", "3"]
    local = resume(flags, folder)
    with preloading("tests.emulated_transformer_engine"):
        engine = resume([*flags, *ENGINE], folder)
    assert_close(engine, local, 1e-6)


ON_GPU = """
import json, sys
import pretrain_glm
from tests.training.pretraining import pretrain_on_this_rank
print("steps:", json.dumps(pretrain_on_this_rank(sys.argv[1:])))
"""


def pretrain_on_gpu(flags: list[str]) -> list[Step]:
    """The steps of a run on one GPU, in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", ON_GPU, *flags], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    line = next(line for line in process.stdout.splitlines() if line.startswith("steps:"))
    return [Step(*step) for step in json.loads(line.removeprefix("steps:"))]


@pytest.mark.gpu
def test_on_a_gpu_a_run_stops_and_goes_on_with_either(corpus, tmp_path):
    flags = [*TINY, *corpus.flags, "--train-iters", str(TOTAL), *KINDS[BF16]]
    whole = pretrain_on_gpu([*flags, *ENGINE])
    first = pretrain_on_gpu([*flags, *ENGINE, *saving(tmp_path)])
    for more in (ENGINE, []):
        resumed = pretrain_on_gpu([*flags, *more, "--load", str(tmp_path)])
        # Kernels on a GPU add in no fixed order, and those of the two round apart.
        assert_close(first + resumed, whole, 1e-3)
