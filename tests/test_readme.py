"""README.md says what is so: its commands parse, its files exist, its generated parts are fresh."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import parse_args

from megatron_glm.flags.arguments import add_glm_arguments, check_flags
from megatron_glm.flags.presets import PRESETS
from tools import convert_checkpoint, generate, update_readme, verify_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    """The commands of all bash blocks, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines]


def commands_with(program):
    found = [words for words in commands() if program in words]
    assert found, f"README.md has no command with {program}"
    return found


def test_generated_parts_are_up_to_date():
    assert update_readme.updated(README) == README, "run tools/update_readme.py"


@pytest.mark.parametrize("words", commands_with("pretrain_glm.py"), ids=lambda words: words[3])
def test_training_commands_parse_and_are_not_refused(words, monkeypatch):
    flags = words[words.index("pretrain_glm.py") + 1 :]
    monkeypatch.setattr(sys, "argv", ["pretrain_glm.py", *flags])
    check_flags(parse_args(add_glm_arguments))


@pytest.mark.parametrize("program", ["tools/train_tokenizer.py", "tools/preprocess_data.py"])
def test_tools_know_the_flags_that_they_are_given(program):
    command = [sys.executable, ROOT / program, "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    for words in commands_with(program):
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"{flag}\b", known), f"{program} has no {flag}"


@pytest.mark.parametrize("tool", [convert_checkpoint, verify_checkpoint, generate],
                         ids=lambda tool: Path(tool.__file__).stem)  # fmt: skip
def test_commands_on_checkpoints_parse(tool):
    program = f"tools/{Path(tool.__file__).name}"
    for words in commands_with(program):
        tool.parse_args(words[words.index(program) + 1 :])


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).stat().st_size < 60_000


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands() if words[0] == "make"]
    assert targets == ["quickstart", "test"]
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_promised_last_line_is_what_the_quickstart_prints():
    promise = re.search(r"^quickstart: done in .*; (.*)$", README, re.MULTILINE)[1]
    assert promise in (ROOT / "examples/quickstart.sh").read_text()


def test_files_that_are_named_exist():
    names = re.findall(r"`(?:DRY_RUN=1 |python )?([\w./-]+/[\w./-]+|\w+\.(?:py|txt|sh))`", README)
    names = [name for name in names if not name.startswith(".venv")]
    assert names
    for name in names:
        assert (ROOT / name).exists(), f"README.md names {name}"


def test_presets_that_are_named_are_all_there_are():
    named = re.search(r"knows the sizes (.*?);", README, re.DOTALL)[1]
    assert set(re.findall(r"\d+[mb]", named)) == set(PRESETS) - {"tiny"}
