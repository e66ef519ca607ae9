"""Inputs and verdicts of a comparison of two checkpoints."""

import numpy as np
import pytest
import torch

from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.verify import Cases, compare, load_cases, random_cases
from tests.checkpoint.building import GOLDEN, MemorySource


def test_golden_cases_are_read_whole():
    cases = load_cases(GOLDEN / "cases.npz")
    assert cases.tokens.shape == (7, 96)
    assert set(cases.logits) == {"fp32", "fp16"}
    assert cases.inside().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("tokens"), "tokens"),
        (lambda a: a.update(samples=a["samples"][0]), r"samples must be \[case, k, 3\]"),
        (lambda a: a.update(position_ids=a["position_ids"][:, 1:]), "position_ids must be"),
        (lambda a: a.update(logits=a["logits"][:2]), "logits must be"),
        (lambda a: a.update(tokens=np.array([object()])), "Object arrays"),
    ],
)
def test_cases_that_do_not_fit_are_refused(tmp_path, change, message):
    arrays = dict(np.load(GOLDEN / "cases.npz"))
    change(arrays)
    np.savez(tmp_path / "cases.npz", **arrays)
    with pytest.raises(CheckpointError, match=f"cases.npz: cannot be used .*{message}"):
        load_cases(tmp_path / "cases.npz")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "cases.npz").write_bytes(b"PK no")
    for name in ("cases.npz", "missing.npz"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot be used"):
            load_cases(tmp_path / name)


@pytest.mark.parametrize("seed", range(20))
def test_random_packs_are_packs(seed):
    cases = random_cases(MemorySource(seq_length=40).settings, seed)
    assert cases.tokens.shape == (6, 40)
    assert 0 <= cases.tokens.min() and cases.tokens.max() < 64
    for samples, positions in zip(cases.samples.tolist(), cases.position_ids, strict=True):
        used = [row for row in samples if row[2]]
        starts = [row[0] for row in used]
        assert starts == [sum(row[2] for row in used[:i]) for i in range(len(used))]
        assert sum(row[2] for row in used) == 40
        for start, context, length in used:
            assert 1 <= context < length
            assert positions[start : start + context].tolist() == list(range(context))
            assert positions[start : start + length].max() < length
    assert cases.inside().all()


def test_verdicts_look_at_the_tokens_of_samples_only():
    samples = torch.tensor([[[0, 1, 3]], [[1, 0, 3]]])
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    cases = Cases(tokens, tokens, samples, {})
    ours = torch.zeros(2, 4, 5)
    ours[..., 0] = 1.0
    theirs = ours.clone()
    theirs[0, 3] = 9.0  # outside
    theirs[1, 2] = torch.tensor([0.0, 0.0, 1.25, 0.0, 0.0])
    first, second = compare(cases, ours, theirs)
    assert first == (0.0, 1.0)
    assert second.largest_difference == 1.25
    assert second.agreement == pytest.approx(2 / 3)
    theirs[0, 0, 0] = float("nan")
    assert next(compare(cases, ours, theirs)).largest_difference == float("inf")


def test_logits_of_other_sizes_are_refused():
    cases = random_cases(MemorySource().settings)
    with pytest.raises(CheckpointError, match="cannot be compared"):
        list(compare(cases, torch.zeros(6, 64, 64), torch.zeros(6, 64, 65)))
