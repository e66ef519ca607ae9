"""Inputs and runs of tools/preprocess_data.py for its tests."""

import random

import pytest

from megatron_glm.data.codecs import build_codec
from tests.data.codecs.models import bpe, python_sources
from tests.tools import forked
from tests.tools.faults import use_small_blocks
from tests.tools.preprocessing import TOOL, arguments


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.json"
    bpe().save(str(path))
    return path


@pytest.fixture(scope="module")
def codec(model):
    return build_codec("HuggingFaceTokenizer", model)


@pytest.fixture(scope="module")
def texts():
    """400 documents of 1 to 800 characters, some of them not ASCII."""
    rng = random.Random(0)
    source = "\n".join(python_sources(8)) + "中文文本。" * 500 + "é🙂" * 300
    starts = [rng.randrange(len(source) - 1000) for _ in range(400)]
    return [source[a : a + rng.randrange(1, 800)] for a in starts]


@pytest.fixture
def tool(tmp_path, model):
    """Runs the tool into tmp_path/out; gives its exit code and output."""

    def run(*argv, setup=use_small_blocks, setup_args=()):
        return forked.run(TOOL, arguments(tmp_path, model, argv), tmp_path / "log",
                          setup, setup_args)

    return run
