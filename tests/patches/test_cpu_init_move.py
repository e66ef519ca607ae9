"""A model that was initialised on the CPU is moved to the GPU before anything wraps it."""

from megatron.training.models import dist_utils

from patches.fix_cpu_init_move import move_first, reproduces


def test_the_move_comes_first(monkeypatch):
    wrap = dist_utils._wrap_with_mp_wrapper
    if getattr(wrap, "__wrapped__", None) is None:
        assert reproduces()
        monkeypatch.setattr(dist_utils, "_wrap_with_mp_wrapper", move_first(wrap))
    assert not reproduces()
