"""The README.md of an export: its code runs, and it asks for what the export needs."""

import re

import pytest

from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.model_card import model_card
from megatron_glm.checkpoint.table import Dimensions, Format
from megatron_glm.checkpoint.tokenizer_export import export_tokenizer
from megatron_glm.data.codecs import build_codec
from tests.checkpoint.building import MemorySource, plan, remote_code_in, write_hugging_face
from tests.data.codecs.models import bpe


def test_its_code_fills_blanks(tmp_path, monkeypatch, capsys):
    bpe(vocab_size=290).save(str(tmp_path / "tokenizer.json"))
    codec = build_codec("HuggingFaceTokenizer", tmp_path / "tokenizer.json")
    source = MemorySource(Dimensions(1, 64, 128, 8, 320), seq_length=128)
    folder = write_hugging_face(tmp_path / "hf", source, export_tokenizer(codec))
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(folder)
    with remote_code_in(tmp_path / "modules"):
        exec(compile(code, "README.md", "exec"), {})
    filled = capsys.readouterr().out
    assert filled.startswith("The") and " of a list is its" in filled
    assert not filled.startswith("The [MASK]")


@pytest.mark.parametrize(
    "bits, kind, packages",
    [
        (None, None, "torch transformers"),
        (None, "tokenizers", "torch transformers"),
        (8, "sentencepiece", "torch transformers sentencepiece compressed-tensors"),
    ],
)
def test_it_names_the_packages_that_are_needed(bits, kind, packages):
    card = model_card("float16", bits, kind)
    assert f"pip install {packages}\n" in card
    assert ("no tokenizer" in card) == (kind is None)
    assert ("INT8" in card) == (bits == 8)


def test_a_quantised_export_says_so(tmp_path):
    source = MemorySource()
    target = plan(source, Format.HUGGING_FACE, quantization_bit_width=4)
    target.write(tmp_path, Conversion(source, target.dtype, target.bits, target.scales))
    assert "compressed-tensors" in (tmp_path / "README.md").read_text()
