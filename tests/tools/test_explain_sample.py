"""tools/explain_sample.py from its command line, on a small corpus and its tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_glm.checkpoint.megatron import MegatronCheckpoint
from megatron_glm.data.blank_infilling import gmask_sample
from megatron_glm.data.packing import pack_samples
from tests.checkpoint.building import MemorySource, write_megatron
from tests.data.test_packing import SPECIAL, visible
from tools import explain_sample

ROOT = Path(__file__).parents[2]
TEXT = ["The quick brown fox jumps over the lazy dog. It sleeps. " * 20,
        "Numbers are words; words are sounds! Who counts them? " * 20] * 10


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A corpus, made by the tools themselves, and the flags that read it."""
    folder = tmp_path_factory.mktemp("corpus")
    source, tokenizer = folder / "text.jsonl", folder / "tokenizer.json"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    run("train_tokenizer.py", "--input", source, "--vocab-size", "300", "--output", tokenizer)
    run("preprocess_data.py", "--input", source, "--append-eod", "--output-prefix",
        folder / "data", *kind)
    return ["--data-path", str(folder / "data_text_document"), "--seq-length", "256",
            "--split", "90,10,0", *kind]


def run(tool, *arguments):
    subprocess.run([sys.executable, ROOT / "tools" / tool, *map(str, arguments)], check=True,
                   capture_output=True, cwd=ROOT)


@pytest.fixture
def explain(monkeypatch, capsys):
    """Runs the tool's main in this process, for importing Megatron takes seconds; its output."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["explain_sample.py", *map(str, arguments)])
        explain_sample.main()
        return capsys.readouterr().out

    return call


def test_a_sample_is_printed_and_drawn(explain, flags, tmp_path, caplog):
    picture = tmp_path / "mask.png"
    text = explain("--index", "3", "--png", picture, "--gpt-prob", "0", *flags)
    # What a run says at its start would be of the one sequence that is shown.
    assert "epochs" not in caplog.text
    assert text.startswith("sequence 3: sequence 3 in epoch 0 of ")
    assert "sample 0: [MASK], tokens 0-63" in text and "blank ⟦1⟧" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_statistics_are_json_on_standard_output(explain, flags):
    found = json.loads(explain("--stats", "20", "--json", "--of", "valid", *flags))
    assert found["tokens"] == 20 * 256 and found["targets_lost"] == 0


def test_flags_may_come_from_a_run(explain, flags, tmp_path, monkeypatch):
    plain = explain("--index", "5", *flags)
    monkeypatch.setattr(sys, "argv", ["pretrain_glm.py", *flags])
    saved = explain_sample.parse_args(explain_sample.add_glm_arguments)
    run = write_megatron(tmp_path / "run", MemorySource(), iteration=20)
    saved.glm_settings = MegatronCheckpoint(run).args.glm_settings
    torch.save({"args": saved}, run / "iter_0000020" / "common.pt")
    assert explain("--index", "5", "--run", run) == plain


@pytest.mark.parametrize("changes, message", [
    (["--of", "test"], "--of test: the flags give that split no data"),
    (["--png", "seen.xyz"], "--png seen.xyz: must end in"),
    (["--data-path", "nowhere"], "nowhere.idx: no such file"),
    (["--run", "nowhere"], "--run takes the flags of the run: drop --data-path"),
])  # fmt: skip
def test_what_cannot_be_shown_is_said_in_one_line(
    explain, flags, changes, message, capsys
):
    refused(explain, capsys, message, *flags, *changes)


def test_a_missing_length_is_named(explain, flags, capsys):
    at = flags.index("--seq-length")
    refused(explain, capsys, "--seq-length is missing", *flags[:at], *flags[at + 2 :])


def test_a_run_that_knows_no_data_is_refused(explain, tmp_path, capsys):
    refused(explain, capsys, "checkpointed_iteration.txt: cannot be read", "--run", "nowhere")
    converted = write_megatron(tmp_path / "converted", MemorySource())
    refused(explain, capsys, "was converted, so it knows no data", "--run", converted)


def refused(explain, capsys, message, *arguments):
    with pytest.raises(SystemExit) as caught:
        explain(*arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("explain_sample.py: error: ") and message in error


def test_what_each_token_sees_is_the_rule_spelled_out():
    samples = [gmask_sample(np.arange(size), hidden, SPECIAL) for size, hidden in ((7, 3), (4, 4))]
    packed = pack_samples(samples, 0, 16, 4, SPECIAL.pad)
    used = int(packed["sample_ends"][1])
    np.testing.assert_array_equal(
        explain_sample.visibility(packed)[:used, :used] > 0, visible(packed)[:used, :used]
    )
