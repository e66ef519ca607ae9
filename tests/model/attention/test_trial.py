"""The backend that auto chooses on a GPU."""

import pytest
import torch

from megatron_glm.errors import GLMError
from megatron_glm.model import glm_model
from megatron_glm.model.attention import trial
from megatron_glm.model.attention.conformance import AttentionSetup
from megatron_glm.model.fused import conformance
from tests.model.building import build_glm
from tests.ranks import run_ranks

SETUP = AttentionSetup(
    backend="auto", batch=2, seq_length=64, heads=2, dim=16, max_samples=8, softmax_scale=0.25,
    dropout_probability=0.1, dtype=torch.float32, device=torch.device("cpu"),
)  # fmt: skip


def choose(milliseconds: list[dict], dropout: float, wrong: tuple[str, ...] = ()) -> str:
    mine = milliseconds[torch.distributed.get_rank()]

    def timed(name, setup):
        if name not in mine:
            raise RuntimeError("does not work here\nmore")
        return mine[name]

    def check(setup):
        if setup.backend in wrong:
            raise GLMError(f"{setup.backend} computes something else")

    trial._milliseconds = timed
    setup = SETUP._replace(dropout_probability=dropout)
    try:
        return trial.fastest_backend(setup, torch.distributed.group.WORLD, check)
    except GLMError as error:
        return str(error)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "milliseconds, best",
    [
        ([{"flex": 2.0, "triton": 1.5, "cudnn": 1.0}], "cudnn"),
        ([{"flex": 1.0, "triton": 1.5}], "flex"),
        ([{"flex": 1.0, "flash": 0.9}], "flash"),
        # The slowest rank counts, and each must be able.
        ([{"flex": 1.0, "triton": 1.2}, {"flex": 1.1, "triton": 1.0}], "flex"),
        ([{"flex": 1.0, "triton": 1.1}, {"triton": 1.5}], "triton"),
    ],
)
def test_the_fastest_that_works_is_chosen_on_every_rank(milliseconds, best):
    size = len(milliseconds)
    assert run_ranks(choose, milliseconds, 0.0, world_size=size) == [best] * size


@pytest.mark.ranks
def test_what_is_fast_and_wrong_is_passed_over():
    times = [{"flash": 0.5, "cudnn": 0.6, "triton": 1.5}]
    assert run_ranks(choose, times, 0.0, ("flash", "cudnn"), world_size=1) == ["triton"]


@pytest.mark.ranks
def test_where_none_works_every_reason_is_given():
    (message,) = run_ranks(choose, [{"flex": 1.0}], 0.1, ("cudnn",), world_size=1)
    assert message == (
        "--glm-attention-backend auto: none works here: triton RuntimeError: does not work here; "
        "cudnn GLMError: cudnn computes something else"
    )


@pytest.mark.ranks
def test_where_one_rank_has_none_every_rank_says_so():
    messages = run_ranks(choose, [{"triton": 1.0}, {}], 0.1, world_size=2)
    none = "--glm-attention-backend auto: none works here: triton "
    assert messages == [
        none + "does not work on another rank; cudnn RuntimeError: does not work here",
        none + "RuntimeError: does not work here; cudnn RuntimeError: does not work here",
    ]


def test_a_gpu_that_a_backend_has_broken_is_not_asked_on(monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(GLMError) as error:
        trial.fastest_backend(SETUP, None, lambda setup: broken())
    assert str(error.value) == (
        "--glm-attention-backend auto: triton has left the GPU unusable to this process (CUDA "
        "error: an illegal memory access was encountered); name another backend of triton, flash, "
        "cudnn, flex, and report it"
    )


@pytest.mark.ranks
def test_with_dropout_what_has_none_is_not_tried():
    times = {"flash": 0.5, "flex": 1.0, "triton": 1.5, "cudnn": 2.0}
    assert run_ranks(choose, [times], 0.1, world_size=1) == ["triton"]


def test_both_passes_are_timed_at_the_shape_of_the_run(monkeypatch):
    seen = []

    def attend(query, key, value, samples, *, softmax_scale, dropout):
        sizes = query.shape, query.stride(), samples.shape
        seen.append((*sizes, softmax_scale, dropout.probability))
        assert samples[:, 0].tolist() == [[25, 0, 0, 0]] * 2 and (samples[:, 1] == 64).all()
        return (query + key + value).flatten(2)

    def do_bench(passes, grad_to_none, return_mode):
        passes()
        assert grad_to_none[0].grad.shape == (64, 2, 2, 48)
        return 1.0

    monkeypatch.setattr(trial, "load_backend", lambda name: attend)
    monkeypatch.setattr(trial, "do_bench", do_bench)
    assert trial._milliseconds("any", SETUP) == 1.0
    assert seen == [((64, 2, 2, 16), (192, 96, 48, 1), (2, 2, 4), 0.25, 0.1)]


def hook(options: dict, device: str) -> list[str]:
    chunks = build_glm(**options)
    setup = glm_model._attention_setup
    glm_model._attention_setup = lambda *given: setup(*given)._replace(device=torch.device(device))
    trial.fastest_backend = lambda setup, group, check: "triton"
    shape = {"micro_batch_size": 2, "seq_length": 64, "max_samples": 8, "checks_mask": True,
             "checks_kernel": True}  # fmt: skip
    done = glm_model.choose_attention_backend(chunks, **shape)
    assert done is chunks
    return [layer.self_attention.core_attention.backend for layer in chunks[0].decoder.layers]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "options, device, backend",
    [
        ({}, "cuda", "triton"),
        ({}, "cpu", "auto"),
        ({"deterministic_mode": True}, "cuda", "auto"),
        ({"glm_attention_backend": "flex"}, "cuda", "flex"),
    ],
)
def test_auto_alone_is_timed_and_on_a_gpu_alone(options, device, backend):
    (backends,) = run_ranks(hook, options, device, world_size=1)
    assert set(backends) == {backend} and len(backends) > 1


def checked_by(checks_mask: bool, checks_kernel: bool) -> list[str]:
    calls = []
    trial.fastest_backend = lambda setup, group, check: check(setup) or "triton"
    glm_model.check_backend = lambda setup: calls.append("mask")
    conformance.check_attention_kernel = lambda setup: calls.append("kernel")
    setup = glm_model._attention_setup
    glm_model._attention_setup = lambda *given: setup(*given)._replace(device=torch.device("cuda"))
    glm_model.choose_attention_backend(
        build_glm(), micro_batch_size=2, seq_length=64, max_samples=8, checks_mask=checks_mask,
        checks_kernel=checks_kernel,
    )
    return calls


@pytest.mark.ranks
def test_candidates_are_checked_as_the_run_checks_its_backend():
    assert run_ranks(checked_by, True, False, world_size=1) == [["mask"]]
    assert run_ranks(checked_by, False, True, world_size=1) == [["kernel"]]
