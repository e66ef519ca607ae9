"""Damaged and hostile checkpoint folders: refused in a clear line, or harmless; nothing is run.

GLM_MUTATIONS sets how many are tried (60; the acceptance run is 2000).
"""

import json
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_glm.checkpoint.formats import open_checkpoint
from megatron_glm.checkpoint.hugging_face_writer import ExportedTokenizer
from megatron_glm.checkpoint.tokenizer_export import read_tokenizer
from tests.checkpoint.building import (
    GOLDEN_SAT,
    SPECIAL_IDS,
    MemorySource,
    assert_same_bits,
    read_all,
    write_hugging_face,
    write_sat,
)
from tools import convert_checkpoint

COUNT = int(os.environ.get("GLM_MUTATIONS", "60"))
TOKENIZER = ExportedTokenizer(b"a model of words" * 100, "tokenizers", SPECIAL_IDS, {})
# A refusal, not a fault of the program.
REFUSED = 2


def run_tool(source: str, target: str, load: Path, save: Path, *more: str) -> int:
    arguments = ["--from", source, "--to", target, "--load", str(load), "--save", str(save), *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert_checkpoint.py", *arguments])
        try:
            convert_checkpoint.main()
        except SystemExit as status:
            return status.code
    return 0


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, tuple[str, Path]]:
    """Checkpoints by name: their format and folder, as the tool writes them or as released."""
    folder = tmp_path_factory.mktemp("originals")
    plain = write_sat(folder / "plain", MemorySource(), 2)
    with_tokenizer = write_hugging_face(folder / "with tokenizer", MemorySource(), TOKENIZER)
    made = {"released": ("sat", GOLDEN_SAT[2]), "plain sat": ("sat", plain)}
    for name, source, load, fmt, more in (
        ("sat int4", "sat", plain, "sat", ["--quantization-bit-width", "4"]),
        ("hf", "hf", with_tokenizer, "hf", []),
        ("hf int8", "sat", plain, "hf", ["--quantization-bit-width", "8"]),
        ("megatron", "sat", plain, "megatron", []),
    ):
        assert run_tool(source, fmt, load, folder / name, *more) == 0
        made[name] = (fmt, folder / name)
    return made


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def any_file(folder: Path, chance: random.Random, pattern: str = "*") -> Path:
    return chance.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


def remove(folder, chance, marker):
    any_file(folder, chance).unlink()


def truncate(folder, chance, marker):
    path = any_file(folder, chance)
    os.truncate(path, int(path.stat().st_size * chance.random()))


def flip(folder, chance, marker):
    path = any_file(folder, chance)
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 5])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def zero(folder, chance, marker):
    path = any_file(folder, chance)
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    length = min(chance.randrange(1, 5000), len(data) - start)
    data[start : start + length] = bytes(length)
    path.write_bytes(data)


def append(folder, chance, marker):
    with any_file(folder, chance).open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 100)))


def swap(folder, chance, marker):
    first, second = any_file(folder, chance), any_file(folder, chance)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def empty(folder, chance, marker):
    any_file(folder, chance).write_bytes(b"")


def run_code(folder, chance, marker):
    with any_file(folder, chance).open("wb") as file:
        torch.save({"module": RunsCode(marker)}, file)


def run_code_in_pickle(folder, chance, marker):
    """The pickle inside an archive, or the whole file, wants to run code."""
    import pickle

    path = any_file(folder, chance)
    evil = pickle.dumps(RunsCode(marker), protocol=2)
    if not zipfile.is_zipfile(path):
        path.write_bytes(evil)
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, evil if name.endswith("data.pkl") else data)


def other_type_or_shape(folder, chance, marker):
    """One tensor of a shard in another type or shape, in a file that is otherwise sound."""
    path = chance.choice(sorted(folder.rglob("*.pt")) or [any_file(folder, chance)])
    if path.suffix != ".pt":
        return truncate(folder, chance, marker)
    module = torch.load(path, weights_only=True)["module"]
    name = chance.choice(sorted(module))
    change = chance.choice(
        [lambda t: t.double(), lambda t: t.to(torch.int32), lambda t: t[:-1], lambda t: t[None],
         lambda t: t.bfloat16(), lambda t: torch.cat((t, t))]
    )  # fmt: skip
    module[name] = change(module[name])
    if chance.random() < 0.2:
        module[f"{name}_x"] = module.pop(name)
    torch.save({"module": module}, path)


def other_number(folder, chance, marker):
    """One value of a JSON file."""
    found = [path for path in folder.rglob("*.json") if path.name != "conversion.json"]
    if not found:
        return flip(folder, chance, marker)
    path = chance.choice(sorted(found))
    content = json.loads(path.read_text())
    key = chance.choice(sorted(content))
    content[key] = chance.choice([None, -1, 0, 10**9, "x", [], {}])
    path.write_text(json.dumps(content))


MUTATIONS = [
    remove, truncate, flip, flip, zero, append, swap, empty, run_code, run_code_in_pickle,
    other_type_or_shape, other_number,
]  # fmt: skip


@pytest.mark.timeout(60 + COUNT)
def test_no_damage_gets_through(originals, tmp_path, capsys):
    outcomes = {"refused": 0, "harmless": 0}
    expected = {name: read_all(open_checkpoint(path)) for name, (_, path) in originals.items()}
    for number in range(COUNT):
        chance = random.Random(number)
        name = chance.choice(sorted(originals))
        mutate = chance.choice(MUTATIONS)
        fmt, original = originals[name]
        folder, save, marker = tmp_path / "damaged", tmp_path / "result", tmp_path / "ran"
        shutil.copytree(original, folder)
        mutate(folder, chance, marker)
        what = f"mutation {number}: {mutate.__name__} of {name}"
        status = run_tool(fmt, fmt, folder, save)
        error = capsys.readouterr().err.strip().splitlines()
        assert not marker.exists(), f"{what}: code was run"
        if status:
            assert status == REFUSED, what
            assert error[-1].startswith("convert_checkpoint.py: error: "), what
            assert not save.exists(), f"{what}: something was left behind"
            outcomes["refused"] += 1
        else:
            found = read_all(open_checkpoint(save))
            assert_weights_same(found, expected[name], what)
            assert read_tokenizer(save, 64) == read_tokenizer(original, 64), what
            outcomes["harmless"] += 1
        assert sorted(path.name for path in tmp_path.iterdir()) == (
            ["damaged"] if status else ["damaged", "result"]
        ), what
        shutil.rmtree(folder)
        shutil.rmtree(save, ignore_errors=True)
    assert outcomes["refused"] > COUNT * 0.6
    print(outcomes)


def assert_weights_same(found, expected, what):
    assert found.keys() == expected.keys(), what
    plain = {}
    for side, weights in (("found", found), ("expected", expected)):
        plain[side] = {
            name: value if isinstance(value, torch.Tensor) else value.dequantize()
            for name, value in weights.items()
        }
    try:
        assert_same_bits(plain["found"], plain["expected"])
    except AssertionError as error:
        raise AssertionError(f"{what}: went through with other weights ({error})") from None
