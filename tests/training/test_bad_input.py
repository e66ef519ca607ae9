"""What a user can get wrong ends in one line that names it, and overwrites nothing."""

import contextlib
import io
import json
import re
import resource
import shutil
from pathlib import Path

import pytest

from megatron_glm.training.save_lock import saving_alone
from tests.ranks import run_ranks
from tests.training.pretraining import TINY, pretrain, pretrain_on_this_rank

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    pretrain([*TINY, *corpus.flags, "--train-iters", "3", "--save", str(folder)])
    return folder


def refuse(flags: list[str]) -> str:
    """The last line that a refused run prints on standard error."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            pretrain_on_this_rank(flags)
        except SystemExit as stop:
            assert stop.code == 2, stop.code
            line = errors.getvalue().strip().splitlines()[-1]
            assert line.startswith("pretrain_glm.py: error: "), errors.getvalue()
            return line
    raise AssertionError("the run was not refused")


def last_line(flags: list[str]) -> str:
    """What a rank of a refused run prints last on standard error; "" where another one speaks."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stop:
        pretrain_on_this_rank(flags)
    assert stop.value.code == 2
    said = [line for line in errors.getvalue().splitlines() if "error: " in line]
    return said[-1] if said else ""


def refused(*flags: str) -> str:
    (message,) = run_ranks(refuse, [*TINY, "--train-iters", "3", *flags], world_size=1,
                           initialize=False)
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def copy_of(corpus, folder: Path):
    copied = shutil.copytree(Path(corpus.prefix).parent, folder / "copy")
    return corpus._replace(prefix=str(copied / Path(corpus.prefix).name))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_data_file(corpus, tmp_path, suffix):
    copy = copy_of(corpus, tmp_path)
    Path(copy.prefix + suffix).unlink()
    message, other = run_ranks(last_line, [*TINY, "--train-iters", "3", *copy.flags], world_size=2,
                               initialize=False)  # fmt: skip
    assert copy.prefix in message and other == ""


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_truncated_data_file(corpus, tmp_path, suffix):
    copy = copy_of(corpus, tmp_path)
    file = Path(copy.prefix + suffix)
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(*copy.flags)
    assert copy.prefix in message


def test_tokenizer_that_the_data_was_not_made_with(corpus, tmp_path):
    other = tmp_path / "tokenizer.json"
    tokenizer = json.loads(Path(corpus.tokenizer_model).read_text())
    tokenizer["model"]["merges"].pop()
    other.write_text(json.dumps(tokenizer))
    message = refused(*corpus._replace(tokenizer_model=str(other)).flags)
    assert str(other) in message or corpus.prefix in message
    assert "tokenizer" in message


def test_missing_tokenizer_file(corpus, tmp_path):
    message = refused(*corpus._replace(tokenizer_model=str(tmp_path / "none.json")).flags)
    assert "none.json" in message


def test_sequence_shorter_than_its_samples(corpus):
    assert "--seq-length 32" in refused(*corpus.flags, "--seq-length", "32")


@pytest.mark.parametrize("flags, named", [
    (["--rotary-angle-dtype", "fp16"], "--rotary-angle-dtype fp32 there, fp16 here"),
    (["--unified-multitask-encoding"], "--unified-multitask-encoding False there, True here"),
    (["--num-layers", "6"], "--num-layers 4 there, 6 here"),
    (["--make-vocab-size-divisible-by", "100"], "--padded-vocab-size 384 there, 400 here"),
])
def test_checkpoint_of_other_settings(corpus, checkpoint, flags, named):
    before = contents(checkpoint)
    directories = ["--load", str(checkpoint), "--save", str(checkpoint)]
    message = refused(*corpus.flags, *directories, *flags)
    assert named in message and str(checkpoint) in message
    assert contents(checkpoint) == before


@pytest.mark.parametrize("saved, flags, named", [
    ([], ["--use-distributed-optimizer"], "saved without --use-distributed-optimizer"),
    (["--use-distributed-optimizer"], [], "saved with --use-distributed-optimizer"),
    (["--no-save-optim"], [], "weights without the state of an optimizer"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_optimizer_state_that_cannot_be_read(corpus, tmp_path, saved, flags, named):
    pretrain([*TINY, *corpus.flags, "--train-iters", "3", "--save", str(tmp_path), *saved])
    assert named in refused(*corpus.flags, "--train-iters", "6", "--load", str(tmp_path), *flags)


def test_a_run_that_is_over_says_how_to_go_on(corpus, checkpoint):
    message = refused(*corpus.flags, "--load", str(checkpoint))
    assert "--train-iters" in message and str(checkpoint) in message


def test_a_run_is_not_overwritten_by_another(corpus, checkpoint):
    before = contents(checkpoint)
    assert "holds a run already" in refused(*corpus.flags, "--save", str(checkpoint))
    assert contents(checkpoint) == before


@pytest.mark.parametrize("flags, named", [
    (["--train-iters", "6"], "decay samples 24 there, 48 here"),
    (["--train-iters", "6", "--lr-decay-iters", "3", "--lr", "2e-3"], "--lr 0.001 there, 0.002"),
])
def test_another_schedule_says_how_to_go_on(corpus, checkpoint, flags, named):
    message = refused(*corpus.flags, "--load", str(checkpoint), *flags)
    assert named in message and "--override-opt-param-scheduler" in message
    assert str(checkpoint) in message


@pytest.mark.parametrize("flags, named", [
    (["--seq-length", "256"], "--seq-length 128 there, 256 here"),
    (["--split", "9,1,0"], "--split 8,1,1 there, 9,1,0 here"),
    (["--gpt-prob", "0.5", "--reset-attention-mask"],
     "--gpt-prob 0.7 there, 0.5 here; --reset-attention-mask False there, True here"),
], ids=lambda value: value[0] if isinstance(value, list) else "")  # fmt: skip
def test_text_that_would_be_cut_in_another_way(corpus, checkpoint, flags, named):
    message = refused(*corpus.flags, "--load", str(checkpoint), *flags)
    assert named in message and "another --seed than 7" in message and str(checkpoint) in message
    # On purpose, and to evaluate, it goes on to the next rule.
    assert "has seen all" in refused(
        *corpus.flags, "--load", str(checkpoint), *flags, "--seed", "8"
    )


@pytest.mark.parametrize("step", ["2", "0"])
def test_a_step_that_was_not_saved(corpus, checkpoint, step):
    message = refused(*corpus.flags, "--load", str(checkpoint), "--ckpt-step", step)
    said = f"--ckpt-step {step}: --load {checkpoint} holds no whole one; the nearest is 3"
    assert said in message


def test_a_restart_does_not_go_back_again(corpus, tmp_path):
    schedule = ["--train-iters", "6", "--override-opt-param-scheduler"]
    flags = [*corpus.flags, *schedule, "--load", str(tmp_path), "--save", str(tmp_path),
             "--save-interval", "2"]  # fmt: skip
    pretrain([*TINY, *flags, "--exit-interval", "4"])
    back = [*flags, "--ckpt-step", "2"]
    pretrain([*TINY, *back, "--exit-interval", "4", "--seed", "8"])
    message = refused(*back)
    assert "--ckpt-step 2: a run that went back there has saved iteration 4 since" in message
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert f"`echo 2 >{tracker}`" in message
    tracker.write_text("2")
    assert len(pretrain([*TINY, *flags])) == 4


def test_a_directory_that_another_run_saves_into(corpus, tmp_path):
    with saving_alone(tmp_path, rank=0):
        assert "another run saves there" in refused(*corpus.flags, "--save", str(tmp_path))


def refuse_to_write(flags: list[str]) -> str:
    """As `refuse`, where no file may grow as large as a checkpoint, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    return refuse(flags)


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(corpus, checkpoint, tmp_path):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    (run / "run.lock").unlink()
    before = contents(run)
    flags = [*TINY, *corpus.flags, "--load", str(run), "--save", str(run), "--train-iters", "5",
             "--override-opt-param-scheduler"]  # fmt: skip
    (message,) = run_ranks(refuse_to_write, flags, world_size=1, initialize=False)
    assert f"--save {run}: a checkpoint cannot be written" in message
    assert "GB are free" in message and "that of iteration 3 is whole" in message
    after = contents(run)
    assert {name: after[name] for name in before} == before
    # What was begun is no checkpoint, and is written over when the run comes there again.
    assert {Path(name).name for name in after.keys() - before.keys()} == {
        "__0_0.distcp", "run.lock"
    }


@pytest.mark.parametrize("flags", [["--load", "{}", "--save", "{}"], ["--save", "{}"]], ids=len)
def test_checkpoints_without_the_file_that_names_the_latest(corpus, checkpoint, tmp_path, flags):
    run = shutil.copytree(checkpoint, tmp_path / "run")
    tracker = run / "latest_checkpointed_iteration.txt"
    tracker.unlink()
    message = refused(*corpus.flags, *(flag.format(run) for flag in flags))
    assert f"{run} holds checkpoints up to iteration 3" in message
    assert f"`echo 3 >{tracker}`" in message
    # One that was never finished is no checkpoint.
    (run / "iter_0000003" / "metadata.json").unlink()
    pretrain([*TINY, *corpus.flags, "--train-iters", "3", "--load", str(run), "--save", str(run)])


@pytest.mark.parametrize("flags, named", [
    (["--load", "{}/none"], "--load {}/none: holds no checkpoint"),
    (["--load", "{}/none", "--save", "{}/new"], "--load {}/none: holds no checkpoint"),
    (["--load", "{}/new", "--save", "{}/new", "--exit-on-missing-checkpoint"],
     "--load {}/new: holds no checkpoint"),
    (["--pretrained-checkpoint", "{}/none", "--load", "{}/new", "--save", "{}/new"],
     "--pretrained-checkpoint {}/none: holds no checkpoint"),
], ids=len)  # fmt: skip
def test_a_checkpoint_that_is_not_there_is_not_replaced_by_chance(corpus, tmp_path, flags, named):
    message = refused(*corpus.flags, *(flag.format(tmp_path) for flag in flags))
    assert named.format(tmp_path) in message
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_program(corpus, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    message = refused(*corpus.flags, "--load", str(tmp_path))
    assert str(tmp_path) in message


def test_a_loss_that_is_not_a_number_stops_the_run(corpus, tmp_path):
    """Before it is saved; the checkpoint before it holds numbers."""
    message = refused(*corpus.flags, "--train-iters", "30", "--save", str(tmp_path),
                      "--save-interval", "1", "--lr", "1e30", "--min-lr", "1e30")  # fmt: skip
    found = re.search(r"found (NaN|Inf) in the loss of iteration (\d+); .*resume from it", message)
    last = int((tmp_path / "latest_checkpointed_iteration.txt").read_text())
    assert last == int(found[2]) - 1
    assert max(path.name for path in tmp_path.glob("iter_*")) == f"iter_{last:07d}"


def test_every_stage_stops_at_a_loss_that_is_not_a_number(corpus):
    flags = [*TINY, *corpus.flags, "--train-iters", "30", "--lr", "1e30", "--min-lr", "1e30",
             "--pipeline-model-parallel-size", "2"]  # fmt: skip
    first, second = run_ranks(last_line, flags, world_size=2, initialize=False)
    assert "in the gradient of iteration" in first and second == ""
