"""Replayed steps give what steps give: decode recorded on a CPU, kernels interpreted."""

# isort: off
import tests.model.attention.interpreter  # noqa: F401  before anything imports Triton

import random
from functools import partial

import pytest
import torch

from megatron_glm.checkpoint.table import Dimensions
from megatron_glm.inference import weights
from megatron_glm.inference.beam_search import BeamSearch
from megatron_glm.inference.blanks import Blank, Mask, Prompt
from megatron_glm.inference.generation import run
from megatron_glm.inference.kv_cache import KVCache
from megatron_glm.inference.search import Ends, Sampler, SearchConfig
from megatron_glm.inference.triton_linear import TritonLinear
from tests.checkpoint.building import MemorySource
from tests.inference.building import make_engine
from tests.inference.replaying import RecordedGraphs

VOCAB_SIZE = 64
FORMS = {"plain": (torch.float32, None), "INT8": (torch.float16, 8), "INT4": (torch.float16, 4)}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Weights as they are there, and a cache that moves often."""
    monkeypatch.setattr(
        weights, "quantized_linear",
        lambda weight, bias, dtype, device: TritonLinear(
            weight.codes, weight.scales, bias, weight.bits, dtype
        ),
    )  # fmt: skip
    monkeypatch.setattr(KVCache, "STEP", 16)


def make(form, kind):
    """An engine whose steps are those of a CPU, those of a GPU, or recorded ones of a GPU."""
    dtype, bits = FORMS[form]
    source = MemorySource(Dimensions(2, 8, 8, 1, VOCAB_SIZE), torch.float32, seed=2)
    engine = make_engine(source, dtype=dtype, bits=bits)
    if kind != "cpu":
        engine.graphs = RecordedGraphs()
        engine.graphs.enabled = kind == "recorded"
    return engine


def steps(engine, num_steps):
    """Logits of every step, on each of which rows may join, leave, be repeated or swapped."""
    choice = random.Random(0)
    token = partial(choice.randrange, VOCAB_SIZE)
    engine.prefill([[token() for _ in range(length)] for length in (3, 14, 1)])
    found = []
    for step in range(num_steps):
        num_rows = engine.cache.num_rows
        tokens = [token() for _ in range(num_rows)]
        # Not where a token lies.
        positions = [choice.randrange(60) for _ in range(num_rows)]
        found.append(engine.decode(tokens, positions).clone())
        if step % 3 == 2:
            engine.cache.select([choice.randrange(num_rows) for _ in range(choice.randint(1, 4))])
        if step == 6:
            engine.prefill([[token() for _ in range(5)]])
    return found


@pytest.mark.parametrize("form, num_steps", [("plain", 9), ("INT8", 6), ("INT4", 6)])
def test_replayed_steps_are_steps(form, num_steps):
    recorded = make(form, "recorded")
    found, expected = (steps(engine, num_steps) for engine in (recorded, make(form, "gpu")))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    # Rows come and go, and the cache moves; every other step finds its graph.
    assert len({len(logits) for logits in found}) > 1
    assert 1 < recorded.graphs.num_captures <= num_steps / 2
    if form == "plain":
        # By a mask and torch's own attention, on rows that are cut where they end.
        for logits, close in zip(found, steps(make(form, "cpu"), num_steps), strict=True):
            assert (logits - close).abs().max() <= 1e-5 * close.abs().max()


def position_of_the_host(engine):
    """A step that has the positions from the host."""
    step = engine._step

    def wrong(inputs):
        position = engine.cache.lengths[0]
        return step(torch.stack((inputs[0], torch.full_like(inputs[1], position), inputs[2])))

    engine._step = wrong


def lengths_of_the_host(engine):
    """A step that cuts the cache at the length of the longest row."""
    engine._attend_by_kernel = engine._attend_by_mask


@pytest.mark.parametrize("spoil", [position_of_the_host, lengths_of_the_host])
def test_a_number_of_the_host_that_was_captured_is_seen(spoil):
    """Without it a comparison of replays with steps would show nothing."""
    engines = make("plain", "recorded"), make("plain", "gpu")
    for engine in engines:
        spoil(engine)
        engine.prefill([[1, 2, 3]])
    differences = [
        not torch.equal(*(engine.decode([5], [3 + step]) for engine in engines))
        for step in range(4)
    ]
    # The first step is run, the second captured and replayed at once.
    assert differences == [False, False, True, True]


def test_searches_end_with_the_same_tokens():
    ends = Ends(sop=54, eop=55, eod=53)
    prompts = [
        Prompt(("",) * 3, (1, 50, 2, 50), (Blank(Mask.MASK, 1, 1, 0), Blank(Mask.MASK, 3, 3, 0))),
        Prompt(("",) * 2, (*range(9), 51), (Blank(Mask.GENERATION, 9, 10, 1),)),
    ]
    configs = [
        SearchConfig(max_new_tokens=7, num_beams=2),
        SearchConfig(max_new_tokens=9, temperature=1.0, seed=5),
    ]
    results = []
    for kind in ("recorded", "cpu"):
        engine = make("plain", kind)
        searches = [
            (BeamSearch if config.num_beams > 1 else Sampler)(prompt, config, ends, 64)
            for config in configs for prompt in prompts
        ]  # fmt: skip
        list(run(engine, searches, max_rows=4))
        results.append([search.best.generated for search in searches])
    assert results[0] == results[1]


def test_what_cannot_be_captured_is_said_once_and_runs(caplog):
    engine = make("plain", "recorded")
    step = engine._step

    def reading(inputs):
        inputs[0, 0].item()
        return step(inputs)

    engine._step = reading
    engine.prefill([[1, 2, 3], [4]])
    other = make("plain", "gpu")
    other.prefill([[1, 2, 3], [4]])
    for at in range(3, 7):
        logits = [each.decode([5, 6], [at, at]) for each in (engine, other)]
        assert torch.equal(*logits)
    assert not engine.graphs.enabled
    (record,) = caplog.records
    assert "not permitted when stream is capturing" in record.getMessage()
