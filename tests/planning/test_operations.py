"""Operations against torch's own counter and the papers' formulas, pairs against real batches."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_glm.data.builder import train_valid_test_datasets
from megatron_glm.model.attention.bounds import dense_mask, make_samples
from megatron_glm.planning.operations import (
    Objective,
    Shares,
    forward_operations,
    hardware_operations,
    model_operations,
    paper_operations_per_token,
    shares,
)
from tests.data.corpora import make_config, random_documents, write_documents
from tests.model.building import build_glm
from tests.planning.jobs import FULL, GLM_130B, SMALL
from tests.ranks import run_ranks

TINY = SMALL.with_(
    num_layers=3, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4,
    padded_vocab_size=512, seq_length=64, micro_batch_size=1, global_batch_size=1,
)  # fmt: skip


def count(options: dict) -> tuple[int, int]:
    """Operations of one sequence's forward pass, and of forward and backward, by torch."""
    (model,) = build_glm(
        num_layers=3, hidden_size=64, ffn_hidden_size=176, vocab_size=512, seq_length=64,
        glm_attention_backend="reference", **options,
    )  # fmt: skip
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    samples = torch.tensor([[[20], [64]]], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, torch.arange(64)[None], samples, labels=tokens).sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


@pytest.mark.ranks
@pytest.mark.parametrize(
    "options",
    [
        {},
        FULL,
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
    ],
)
def test_operations_are_those_that_torch_counts(options):
    ((forward, both),) = run_ranks(count, options, world_size=1)
    job = TINY.with_(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in options.items()})  # fmt: skip
    assert forward_operations(job).total == forward
    assert hardware_operations(job) == both
    assert model_operations(job) == 3 * forward


def test_model_operations_are_the_formula_of_megatrons_paper():
    # arXiv 2104.04473 has 96 with a recomputed forward pass, 72 without.
    s, h, v = GLM_130B.seq_length, GLM_130B.hidden_size, GLM_130B.padded_vocab_size
    layers = GLM_130B.num_layers
    formula = 72 * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert model_operations(GLM_130B) == pytest.approx(formula, rel=1e-12)


def test_the_papers_way_of_counting_gives_the_same():
    per_sequence = paper_operations_per_token(GLM_130B) * GLM_130B.seq_length
    assert model_operations(GLM_130B) == pytest.approx(per_sequence, rel=2e-4)
    # HFU 43.3%, MFU 32.5%.
    ratio = hardware_operations(GLM_130B) / model_operations(GLM_130B)
    assert ratio == pytest.approx(43.3 / 32.5, rel=4e-3)


@pytest.mark.parametrize("gpt_prob", [0.0, 0.7, 1.0])
def test_the_shares_are_those_of_real_batches(tmp_path, gpt_prob):
    text = write_documents(tmp_path / "text", random_documents(0, 100, 800))
    config = make_config(text, gpt_prob=gpt_prob, short_seq_prob=0.0, single_span_prob=0.0)
    train = train_valid_test_datasets(config, [200, 0, 0])[0]
    measured = []
    for index in range(100):
        batch = train[index]
        samples = make_samples(
            torch.as_tensor(batch["context_lengths"])[None],
            torch.as_tensor(batch["sample_ends"])[None],
        )
        visible = dense_mask(samples, len(batch["tokens"])).float().mean().item()
        measured.append((visible, float(batch["loss_mask"].mean())))
    measured = torch.tensor(measured)
    spread = measured.std(dim=0) / len(measured) ** 0.5
    expected = torch.tensor(shares(Objective(gpt_prob=gpt_prob)))
    assert ((measured.mean(dim=0) - expected).abs() < 0.003 + 3 * spread).all()


def test_a_context_of_nothing_makes_a_causal_model():
    assert shares(Objective(gpt_prob=1.0, min_gmask_ratio=1.0)) == Shares()
