"""Hugging Face exports: the logits of the released code, transformers' own generation, and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from megatron_glm.checkpoint.convert import Conversion
from megatron_glm.checkpoint.errors import (
    CheckpointError,
    CorruptFileError,
    MissingTensorError,
    ShapeError,
    UnknownTensorError,
)
from megatron_glm.checkpoint.hugging_face import HuggingFaceCheckpoint
from megatron_glm.checkpoint.quantization import quantize
from megatron_glm.checkpoint.reference import prefix_mask
from megatron_glm.checkpoint.sat import SATCheckpoint
from megatron_glm.checkpoint.table import Dimensions, Format
from megatron_glm.checkpoint.tokenizer_export import export_tokenizer
from megatron_glm.data.codecs import build_codec
from tests.checkpoint.building import (
    GOLDEN,
    GOLDEN_SAT,
    MemorySource,
    assert_same_bits,
    plan,
    read_all,
    remote_code_in,
    write_hugging_face,
)
from tests.checkpoint.naive_generation import fill_greedily, next_scores


def load_model(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, **options
    ).eval()


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    with remote_code_in(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    from tests.training.corpus import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"), num_documents=20).tokenizer_model


@pytest.fixture(scope="module")
def export(tmp_path_factory, tokenizer_model):
    """A model with a tokenizer whose weights are large enough for lively answers."""
    codec = build_codec("HuggingFaceTokenizer", tokenizer_model)
    vocab_size = -(-codec.vocab_size // 64) * 64
    source = MemorySource(Dimensions(3, 64, 96, 4, vocab_size), dtype=torch.float32, seed=3)
    folder = tmp_path_factory.mktemp("export") / "hf"
    return write_hugging_face(folder, source, export_tokenizer(codec)), source, codec.specials


@pytest.fixture(scope="module")
def model(export):
    return load_model(export[0])


@pytest.fixture(scope="module")
def tokenizer(export):
    return AutoTokenizer.from_pretrained(export[0], trust_remote_code=True, local_files_only=True)


PROMPTS = {
    "gmask": "abc [gMASK]",
    "one blank": "gabcdefghij [MASK] ij",
    "two blanks": "ab [MASK] cdefabc [sMASK] hij",
    "no mask at all": "jih gf",
}


@pytest.mark.parametrize("angles, name", [("fp32", "logits"), ("fp16", "logits_fp16_rope")])
def test_logits_equal_the_released_code(tmp_path, angles, name):
    source = SATCheckpoint(GOLDEN_SAT[4])
    source.settings = source.settings.with_overrides(rotary_angle_dtype=angles)
    model = load_model(write_hugging_face(tmp_path / "hf", source), dtype=torch.float32)
    cases = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "cases.npz").items()}
    with torch.no_grad():
        packed = model(
            cases["tokens"], prefix_mask(cases["samples"], 96)[:, None], cases["position_ids"]
        ).logits
        alone = model(
            cases["tokens"][:5], position_ids=cases["position_ids"][:5],
            context_lengths=cases["samples"][:5, 0, 1],
        ).logits  # fmt: skip
    assert (packed - cases[name]).abs().max() < 1e-4
    assert (alone - cases[name][:5]).abs().max() < 1e-4


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_an_export_is_read_back_bit_for_bit(tmp_path, shard_bytes):
    source = MemorySource(dtype=torch.bfloat16, tokenizer_fingerprint={"sha256": "1"})
    folder = write_hugging_face(tmp_path / "hf", source, shard_bytes=shard_bytes)
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.settings == source.settings
    assert_same_bits(read_all(checkpoint), source.weights)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_bytes < 10**6)
    loaded = load_model(folder).state_dict()
    assert torch.equal(loaded["lm_head.weight"], source.weights["embedding.word_embeddings.weight"])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_generation_is_that_of_the_plain_forward(export, model, tokenizer, name, cached):
    _, source, specials = export
    prompt = tokenizer(PROMPTS[name], return_tensors="pt")
    ids = prompt.input_ids[0].tolist()
    assert ids[-1] == specials["<sop>"]
    output = model.generate(**prompt, max_new_tokens=20, do_sample=False, use_cache=cached)
    assert output[0, len(ids) :].tolist() == fill_greedily(source, specials, ids[:-1], 20)


def test_blanks_are_filled_one_after_another(export, model, tokenizer):
    _, source, specials = export
    # Let `eop` come soon.
    with torch.no_grad():
        bias = model.model.norm.bias.clone()
        model.model.norm.bias += model.lm_head.weight[specials["<eop>"]] * 1.5
    source.weights["decoder.final_layernorm.bias"] = model.model.norm.bias.detach()
    try:
        prompt = tokenizer(PROMPTS["two blanks"], return_tensors="pt")
        ids = prompt.input_ids[0].tolist()
        output = model.generate(**prompt, max_new_tokens=30, do_sample=False)
        output = output[0, len(ids) :].tolist()
        assert output == fill_greedily(source, specials, ids[:-1], 30)
        assert output.count(specials["<sop>"]) == 1
        assert output[-1] == specials["<eop>"]
        filled = tokenizer.fill_blanks([*ids, *output])
        assert "MASK" not in filled and "sop" not in filled
    finally:
        model.model.norm.bias.data = bias
        source.weights["decoder.final_layernorm.bias"] = bias


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_padded_batch_gives_what_each_prompt_gives_alone(model, tokenizer, options):
    options = {"max_new_tokens": 10, "do_sample": False, **options}
    batch = tokenizer(list(PROMPTS.values()), return_tensors="pt", padding=True)
    assert (batch.attention_mask[:, 0] == 0).any() and batch.attention_mask[:, -1].all()
    together = model.generate(**batch, **options)[:, batch.input_ids.shape[1] :]
    for prompt, row in zip(PROMPTS.values(), together, strict=True):
        single = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**single, **options)[0, single.input_ids.shape[1] :]
        assert torch.equal(alone, row[: len(alone)])


@pytest.mark.parametrize("name", ["gmask", "one blank"])
def test_beam_search_keeps_the_best_of_all_continuations(export, model, tokenizer, name):
    _, source, specials = export
    prompt = tokenizer(PROMPTS[name], return_tensors="pt")
    context = prompt.input_ids[0].tolist()[:-1]
    beams, size, steps = [(0.0, [])], 4, 4
    for _ in range(steps):
        options = [
            (score + gain, [*filling, token])
            for score, filling in beams
            for token, gain in enumerate(
                next_scores(source, specials, (context, [filling])).tolist()
            )
        ]
        beams = sorted(options, reverse=True)[:size]
        ends = {specials["<eop>"], specials["<eod>"]}
        assert not any(ends & set(filling) for _, filling in beams), "choose another seed"
    output = model.generate(**prompt, max_new_tokens=steps, num_beams=size, do_sample=False)
    assert output[0, len(context) + 1 :].tolist() == beams[0][1]


def test_a_pipeline_fills_blanks(export, model, tokenizer):
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    answers = generate(list(PROMPTS.values()), max_new_tokens=5, do_sample=False, batch_size=2)
    assert len(answers) == len(PROMPTS)
    assert all(len(answer[0]["generated_text"]) > 5 for answer in answers)


def test_prompts_without_sop_and_contexts_in_pieces_are_refused(model, tokenizer):
    ids = tokenizer("abc [MASK]", add_special_tokens=False, return_tensors="pt").input_ids
    with pytest.raises(ValueError, match="no sop"):
        model.generate(ids, max_new_tokens=2)
    prompt = tokenizer("abcabcabc [MASK] abc", return_tensors="pt")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**prompt, max_new_tokens=2, prefill_chunk_size=4)
    with pytest.raises(ValueError, match="cache"):
        model.generate(**prompt, max_new_tokens=2, cache_implementation="static")


def test_engines_with_their_own_attention_refuse_it(model):
    assert model.config.model_type not in ("glm", "chatglm")
    assert not getattr(type(model), "_supports_attention_backend", False)


SCRIPT = """
import socket, sys
socket.socket.connect = None
sys.modules["megatron_glm"] = sys.modules["megatron"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
out = model.generate(**tokenizer("abc [MASK] d", return_tensors="pt"), max_new_tokens=6)
print(out.tolist())
"""


def test_an_export_stands_alone_and_offline(export, model, tokenizer, tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(export[0])],
        capture_output=True, text=True, cwd=tmp_path, timeout=200,
        env=os.environ | {"HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = model.generate(**tokenizer("abc [MASK] d", return_tensors="pt"), max_new_tokens=6)
    assert json.loads(result.stdout) == expected.tolist()


REGISTERED = """
import sys
from megatron_glm.checkpoint.hugging_face_model import register
from transformers import AutoModelForCausalLM, AutoTokenizer
register()
for kind in (AutoModelForCausalLM, AutoTokenizer):
    assert type(kind.from_pretrained(sys.argv[1])).__module__.startswith("megatron_glm.")
"""


def test_registered_classes_need_no_trust(export):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REGISTERED, str(export[0])],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 32])
def test_quantised_exports_load_in_transformers(tmp_path, bits, group_size):
    pytest.importorskip("compressed_tensors")
    source = MemorySource()
    target = plan(source, Format.HUGGING_FACE, quantization_bit_width=bits,
                  quantization_group_size=group_size)  # fmt: skip
    target.write(tmp_path, Conversion(source, target.dtype, target.bits, target.scales))
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert (checkpoint.bits, checkpoint.scales) == (bits, target.scales)

    dense = MemorySource(dtype=torch.float32)
    for name, weight in source.weights.items():
        dense.weights[name] = weight.float()
        if "linear" in name and name.endswith("weight"):
            groups = weight.shape[1] // group_size if group_size else 1
            expected = quantize(weight, bits, groups)
            scales = expected.scales.repeat_interleave(weight.shape[1] // groups, dim=1)
            dense.weights[name] = expected.codes.float() * scales.float()
    tokens = torch.randint(0, 64, (2, 20))
    lengths = torch.tensor([5, 12])
    with torch.no_grad():
        ours = load_model(tmp_path, dtype=torch.float32)(tokens, context_lengths=lengths).logits
        folder = write_hugging_face(tmp_path / "dense", dense)
        theirs = load_model(folder)(tokens, context_lengths=lengths).logits
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tp", [1, 2])
def test_glm_codes_go_to_hugging_face_and_back_without_loss(tmp_path, bits, tp):
    source = MemorySource()
    made = []
    for number, (fmt, opened) in enumerate(
        [(Format.SAT, SATCheckpoint), (Format.HUGGING_FACE, HuggingFaceCheckpoint),
         (Format.SAT, SATCheckpoint)]
    ):  # fmt: skip
        options = {"quantization_bit_width": bits} if number == 0 else {}
        if fmt is Format.SAT:
            options["target_tp"] = tp
        target = plan(source, fmt, **options)
        folder = tmp_path / str(number)
        folder.mkdir()
        conversion = Conversion(source, target.dtype, target.bits, target.scales)
        target.write(folder, conversion)
        conversion.finish()
        made.append(conversion.hashes)
        source = opened(folder)
    assert {name: entry["target"] for name, entry in made[0].items()} == {
        name: entry["target"] for name, entry in made[2].items()
    }


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


NAME = "model.layers.0.mlp.down_proj.bias"


@pytest.mark.parametrize(
    "file, change, error, message",
    [
        ("config.json", lambda c: c.update(model_type="glm"), CheckpointError, "model_type 'glm'"),
        ("config.json", lambda c: c.pop("hidden_size"), CheckpointError, "hidden_size"),
        ("config.json", lambda c: c.update(hidden_size=32), ShapeError, "embed_tokens"),
        ("config.json", lambda c: c.update(num_hidden_layers=1), UnknownTensorError, "layers.1"),
        ("config.json", lambda c: c.update(num_hidden_layers=3), MissingTensorError, "layers.2"),
        ("config.json", lambda c: c.update(quantization_config={}), CheckpointError,
         "quantization_config"),
        ("model.safetensors.index.json", lambda c: c["weight_map"].pop(NAME), UnknownTensorError,
         NAME),
        ("model.safetensors.index.json", lambda c: c["weight_map"].update({NAME: "../x"}),
         CorruptFileError, "outside its folder"),
        ("model.safetensors.index.json", lambda c: c["weight_map"].update({NAME: "x"}),
         CheckpointError, "x: is missing"),
        ("model.safetensors.index.json", lambda c: c["weight_map"].update(
            {"model.x": c["weight_map"][NAME]}), MissingTensorError, "lacks model.x"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused_by_name(tmp_path, file, change, error, message):
    folder = write_hugging_face(tmp_path / "hf", MemorySource())
    edit_json(folder / file, change)
    with pytest.raises(error, match=message):
        HuggingFaceCheckpoint(folder)
