"""tools/generate.py fills blanks from a checkpoint of any format, on one rank or several."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys

import httpx
import pytest
import torch

from megatron_glm.data.codecs.training import train_byte_level_bpe
from megatron_glm.data.tokenizer import build_tokenizer
from tests.checkpoint.building import write_hugging_face, write_megatron, write_sat
from tests.inference.building import lively_source
from tests.ranks import run_ranks
from tools import generate

TEXT = "the cat sat on the mat; the quick brown fox jumps over the lazy dog and then rests "
PROMPTS = ["the[MASK] sat on the[MASK]", "the quick brown fox"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer and the same checkpoint in all formats."""
    folder = tmp_path_factory.mktemp("generate")
    path = folder / "tokenizer.json"
    path.write_bytes(train_byte_level_bpe([TEXT * 3], 290))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", path)
    source = lively_source(
        tokenizer._tokenizer.specials, 0.3, tokenizer_fingerprint=tokenizer.fingerprint
    )
    # What all formats can hold, so that answers are the same.
    source.weights = {name: weight.half() for name, weight in source.weights.items()}
    source.dtype = torch.float16
    write_megatron(folder / "megatron", source)
    write_hugging_face(folder / "hf", source)
    write_sat(folder / "sat", source, tp_size=2)
    return folder


def flags(folder, fmt="megatron", *more):
    return [
        "--load", str(folder / fmt), "--tokenizer-type", "HuggingFaceTokenizer",
        "--tokenizer-model", str(folder / "tokenizer.json"), "--max-new-tokens", "12", *more,
    ]  # fmt: skip


def prompts(*texts):
    return [word for text in texts for word in ("--prompt", text)]


@pytest.fixture
def output(capsys):
    """Runs the tool and returns the lines that it prints."""

    def run(*arguments):
        generate.main(list(arguments))
        return capsys.readouterr().out.split("\n")[:-1]

    return run


def test_blanks_are_marked_in_the_text(folder, output):
    first = "\n".join(output(*flags(folder), *prompts(PROMPTS[0])))
    assert first.startswith("the⟦") and "⟧ sat on the" in first
    second = "\n".join(output(*flags(folder), *prompts(PROMPTS[1])))
    assert second.startswith("the quick brown fox⟦") and second.endswith("⟧")


def test_json_has_the_parts(folder, output):
    lines = output(*flags(folder), *prompts(*PROMPTS), "--json")
    results = [json.loads(line) for line in lines]
    assert [result["prompt"] for result in results] == PROMPTS
    for result in results:
        assert result["finish_reason"] in ("stop", "length")
        assert 1 <= result["num_new_tokens"] <= 12
        assert all(fill in result["text"] for fill in result["fills"])
    assert len(results[1]["fills"]) == 1


@pytest.mark.parametrize("search", [[], ["--num-beams", "3"], ["--temperature", "0.7"]], ids=str)
def test_every_format_gives_the_same_text(folder, output, search):
    arguments = [*prompts(*PROMPTS), *search]
    expected = output(*flags(folder), *arguments)
    assert output(*flags(folder, "hf"), *arguments) == expected
    # SAT holds no settings, and the released model's angles are fp16.
    angles = ["--rotary-angle-dtype", "fp32", "--format", "sat"]
    assert output(*flags(folder, "sat"), *arguments, *angles) == expected


def test_texts_from_a_file_and_from_standard_input(folder, output, tmp_path, monkeypatch):
    expected = output(*flags(folder), *prompts(*PROMPTS))
    path = tmp_path / "texts"
    path.write_text("\n\n".join(PROMPTS) + "\n")
    assert output(*flags(folder), "--input", str(path)) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    assert output(*flags(folder)) == expected


def test_bytes_that_are_no_text_are_refused(folder, capsys, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"the \xff[MASK]\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    assert "holds '\\udcff' at character 4" in fails(capsys, *flags(folder))


def test_on_a_terminal_it_asks_on_whatever_is_typed(folder, output, monkeypatch):
    expected = output(*flags(folder), *prompts(PROMPTS[1]))
    answers = iter(["[gMASK][gMASK]", PROMPTS[1], ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: next(answers))
    assert output(*flags(folder)) == expected


def test_the_same_text_is_drawn_anew_and_a_seed_gives_the_same(folder, output):
    texts = prompts(PROMPTS[1], PROMPTS[1])
    arguments = [*flags(folder), *texts, "--temperature", "1.5", "--json"]
    first, second = output(*arguments)
    assert first != second
    assert output(*arguments) == [first, second]
    assert output(*arguments, "--seed", "7") != [first, second]


@pytest.mark.parametrize("bits", ["8", "4"])
def test_weights_are_quantised_on_request(folder, output, bits):
    quantised = ["--quantization-bit-width", bits, "--json"]
    (line,) = output(*flags(folder), *prompts(PROMPTS[1]), *quantised)
    assert json.loads(line)["text"].startswith(PROMPTS[1])


def generate_on_a_rank(arguments):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate.main(arguments)
    return printed.getvalue().split("\n")[:-1]


@pytest.mark.ranks
@pytest.mark.parametrize("flag", ["--tensor-model-parallel-size", "--pipeline-model-parallel-size"])
def test_two_ranks_print_what_one_does_and_once(folder, output, flag):
    arguments = [*flags(folder), *prompts(*PROMPTS), "--num-beams", "2"]
    printed = run_ranks(
        generate_on_a_rank, [*arguments, flag, "2"], world_size=2, initialize=False
    )
    assert printed == [output(*arguments), []]


def test_the_server_answers_until_it_is_interrupted(folder):
    command = [sys.executable, generate.__file__, *flags(folder), "--serve", "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = process.stdout.readline().split()[-1]
            answer = httpx.post(f"{address}/generate", json={"prompt": PROMPTS[0]}, timeout=60)
            assert answer.json()["text"].startswith("the")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate.py"])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        generate.main(list(arguments))
    assert raised.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("generate.py: error: ") and "\n" not in error
    return error


@pytest.mark.parametrize("flag, value, rule", [
    ("--max-batch-size", "0", "at least 1"), ("--max-waiting", "-1", "at least 0"),
    ("--port", "65536", "from 0 to 65535"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(folder, capsys, flag, value, rule):
    error = fails(capsys, *flags(folder), *prompts("a"), flag, value)
    assert f"{flag} {value}: must be {rule}" in error


def test_another_tokenizer_is_refused(folder, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_bytes(train_byte_level_bpe([TEXT[::-1] * 3], 290))
    arguments = flags(folder)
    arguments[arguments.index("--tokenizer-model") + 1] = str(other)
    error = fails(capsys, *arguments, *prompts("a"))
    assert str(other) in error and "sha256" in error and "give that file" in error


@pytest.mark.parametrize(
    "more, message",
    [
        (["--prompt", "[gMASK] [MASK]"], "only blank"),
        (["--prompt", "a", "--top-k", "3"], "--top-k 3: has no effect at --temperature 0"),
        (["--prompt", "dog " * 300], "shorten"),
        (["--input", "nowhere"], "--input nowhere"),
        (["--prompt", "a", "--tensor-model-parallel-size", "2"], "torchrun --nproc-per-node 2"),
        (["--prompt", "a", "--format", "sat"], "latest"),
    ],
    ids=["two kinds", "search", "length", "input", "processes", "format"],
)
def test_what_a_user_can_get_wrong_is_said_in_one_line(folder, capsys, more, message):
    assert message in fails(capsys, *flags(folder), *more)


def test_a_broken_checkpoint_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder / "hf", tmp_path / "hf")
    shutil.copy(folder / "tokenizer.json", tmp_path)
    (shard,) = (tmp_path / "hf").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:1000])
    assert shard.name in fails(capsys, *flags(tmp_path, "hf"), *prompts("a"))


def test_texts_for_a_server_are_refused(folder, capsys):
    with pytest.raises(SystemExit) as end:
        generate.main(flags(folder, "megatron", "--serve", *prompts("the[MASK]")))
    assert end.value.code == 2 and "--serve takes texts over HTTP" in capsys.readouterr().err
