"""Greedy and beam search find what plain definitions and transformers find."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from megatron_glm.checkpoint.tokenizer_export import export_tokenizer
from megatron_glm.errors import GLMError
from megatron_glm.inference.beam_search import BeamSearch
from megatron_glm.inference.blanks import BlankCodec
from megatron_glm.inference.generation import run
from megatron_glm.inference.search import Ends, Filling, Sampler, SearchConfig
from tests.checkpoint.building import write_hugging_face
from tests.checkpoint.naive_generation import fill_greedily
from tests.inference.building import VOCAB_SIZE, lively_source, make_filler

PROMPTS = {
    "gmask": "the quick brown fox jumps over [gMASK]",
    "added gmask": "the lazy dog",
    "one blank": "the [MASK] sat on the mat;",
    "sentence": "the dog rests;[sMASK] and then the fox",
    "two blanks": "the [MASK] brown fox[MASK] over the lazy dog and then rests",
    "three blanks": "[MASK] cat [MASK] on the mat [MASK]",
}
SEARCHES = [
    {},
    {"no_repeat_ngram_size": 2},
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 2.0},
    {"num_beams": 3, "length_penalty": -1.0, "no_repeat_ngram_size": 3},
]
NEW_TOKENS = 14


def fill(filler, texts, **options):
    """Generated ids of each text, all in one batch."""
    config = SearchConfig(**{"max_new_tokens": NEW_TOKENS} | options)
    searches = [filler.search(filler.codec.encode(text), config) for text in texts]
    list(run(filler.engine, searches, max_rows=12))
    return [list(search.best.generated) for search in searches]


@pytest.fixture(scope="module", params=[0.0, 0.35], ids=["goes on", "ends soon"])
def source(request, specials):
    return lively_source(specials, request.param)


@pytest.fixture(scope="module")
def filler(source, tokenizer):
    return make_filler(source, tokenizer)


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_filling_is_that_of_the_plain_forward(filler, source, specials, name):
    """With a cache it is what the whole sequence gives at every step without one."""
    context = list(filler.codec.encode(PROMPTS[name]).context)
    (found,) = fill(filler, [PROMPTS[name]])
    assert found == fill_greedily(source, specials, context, NEW_TOKENS)


@pytest.fixture(scope="module")
def exported(source, tokenizer, tmp_path_factory):
    """The same model under transformers."""
    folder = tmp_path_factory.mktemp("export") / "hf"
    write_hugging_face(folder, source, export_tokenizer(tokenizer._tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
        options = {"trust_remote_code": True, "local_files_only": True}
        yield (
            AutoModelForCausalLM.from_pretrained(folder, **options).eval(),
            AutoTokenizer.from_pretrained(folder, **options),
        )


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_transformers_generates_the_same_tokens(filler, exported, tokenizer, options):
    """In one batch of mixed lengths, greedily and by beams, with its cache and without."""
    model, exported_tokenizer = exported
    texts = list(PROMPTS.values())
    batch = exported_tokenizer(texts, return_tensors="pt", padding=True)
    assert (batch.attention_mask == 0).any()
    found = fill(filler, texts, **options)
    assert len({tuple(generated) for generated in found}) > 3
    for use_cache in (True, False):
        output = model.generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=use_cache, **options
        )
        for ours, row in zip(found, output[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            theirs = [token for token in row if token != tokenizer.pad]
            assert ours == theirs


@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_a_batch_gives_what_each_prompt_gives_alone(filler, options):
    texts = list(PROMPTS.values())
    assert fill(filler, texts, **options) == [fill(filler, [text], **options)[0] for text in texts]


def test_draws_depend_on_the_seed_and_not_on_the_batch(filler):
    texts = list(PROMPTS.values())
    options = {"temperature": 1.0, "top_k": 50, "top_p": 0.95}
    together = fill(filler, texts, **options)
    assert together == [fill(filler, [text], **options)[0] for text in texts]
    assert together == fill(filler, texts, **options)
    assert together != fill(filler, texts, **options, seed=5)


def plain_search(prompt, kind, **options):
    ends = Ends(0, 1, 2)
    return kind(prompt, SearchConfig(**options), ends, 100)


def test_wide_beams_find_the_best_of_all_sequences(tokenizer):
    """With scores that depend on the last token alone, against every sequence there is."""
    prompt = BlankCodec(tokenizer).encode("the")
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))
    length, penalty = 4, 0.7
    search = plain_search(
        prompt, BeamSearch, max_new_tokens=length, num_beams=200, length_penalty=penalty
    )
    while not search.finish_reason:
        last = [row.generated[-1] if row.generated else 0 for row in search.rows]
        parents = search.advance(table[last])
        assert len(parents) == len(search.rows)

    scores = table.log_softmax(-1)
    best = {}
    for size in range(1, length + 1):
        for tokens in itertools.product(range(1, 8), repeat=size):
            ended = tokens[-1] in (1, 2) or size == length
            if ended and not {1, 2} & set(tokens[:-1]):
                score = sum(scores[a, b] for a, b in itertools.pairwise((0, *tokens)))
                best[tokens] = float(score) / size**penalty
    ranked = sorted(best, key=best.get, reverse=True)
    assert [filling.generated for _, filling in search.finished[:5]] == ranked[:5]
    assert search.finished[0][0] == pytest.approx(best[ranked[0]], abs=1e-5)


def test_sop_replaces_eop_where_another_blank_waits(tokenizer):
    prompt = BlankCodec(tokenizer).encode("[MASK] and[MASK]")
    filling = Filling(prompt)
    scores = torch.arange(8.0)
    filling.constrain(scores, Ends(0, 1, 2), 0)
    assert scores[0] == 1 and scores[1] == -torch.inf
    scores = torch.arange(8.0)
    filling.append(0, Ends(0, 1, 2)).constrain(scores, Ends(0, 1, 2), 0)
    assert scores[0] == -torch.inf and scores[1] == 1


def test_a_prompt_leaves_its_room_and_no_more(filler):
    """What fits into the length that the model was trained on is generated, then it is cut."""
    seq_length = filler.engine.settings.seq_length
    text = "the quick brown fox " * 40
    codec = filler.codec
    context = codec.encode(text).context
    words = text.split()
    while len(context) > seq_length - 3:
        words.pop()
        context = codec.encode(" ".join(words)).context
    search = filler.search(codec.encode(" ".join(words)), SearchConfig(max_new_tokens=500))
    list(run(filler.engine, [search], 1))
    if search.finish_reason == "length":
        assert len(search.best.generated) == seq_length - len(context)
    with pytest.raises(GLMError, match=rf"{len(codec.encode(text).context)} tokens.*shorten"):
        filler.search(codec.encode(text), SearchConfig())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: must be at least 1"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p 0.0"),
        ({"top_k": 5}, "top_k 5: has no effect at temperature 0"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams 2: beams are not sampled"),
        ({"length_penalty": float("inf")}, "length_penalty inf"),
    ],
)
def test_values_without_a_meaning_are_refused(options, message):
    with pytest.raises(GLMError, match=message):
        SearchConfig(**options)


def test_sampler_is_over_at_the_end_of_a_document(tokenizer):
    prompt = BlankCodec(tokenizer).encode("[MASK] and[MASK]")
    search = plain_search(prompt, Sampler)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2] = 5
    assert search.advance(logits) == []
    assert search.finish_reason == "stop" and search.best.generated == (2,)
