"""Counts, on a CPU, where a program would wait for a GPU.

    with HostReads() as reads:
        step()
    assert reads.sites == {}

A value that the host reads makes it wait until the device has computed it; a value that it uploads
from ordinary memory waits for the stream. Both are seen here by what is called, on any device;
what is in host memory on every machine is left out: a data loader's work, random states.
"""

import sys
from collections import Counter
from functools import wraps
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its shape, the host has to know.
READS = {
    "_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "_linalg_check_errors",
}  # fmt: skip
# Methods that copy a tensor to the host, which a CPU does without an operation.
COPIES = {"tolist", "numpy", "cpu", "__array__"}
# Makes of values of the host a tensor, on the device that it is told.
UPLOADS = {"tensor", "as_tensor"}
ROOT = Path(__file__).parents[1]
# Functions that wait for everything.
WAITS = ((torch.cuda, "synchronize"), (torch.distributed, "barrier"))
# Whose calls stand for the code that made them.
PASSED_OVER = ("torch", "contextlib.py", "tests", "patches")
# What they call, and what they do themselves, is in host memory or part of a test.
LEFT_OUT = ("torch/utils/data", "megatron/core/tensor_parallel/random.py:fork")
LEFT_OUT_ITSELF = ("tests/training/pretraining.py:recording_log",)


class HostReads:
    """`sites`: how often the host waits, by "operation at file:function" of the code that asks."""

    def __init__(self):
        self.sites: Counter[str] = Counter()
        self._modes = (_Operations(self), _Functions(self))
        self._waits = [getattr(holder, name) for holder, name in WAITS]

    def __enter__(self):
        for (holder, name), wait in zip(WAITS, self._waits, strict=True):
            setattr(holder, name, self._counted(wait))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for (holder, name), wait in zip(WAITS, self._waits, strict=True):
            setattr(holder, name, wait)

    def _counted(self, wait):
        @wraps(wait)
        def counted(*args, **kwargs):
            self.count(wait.__name__)
            return wait(*args, **kwargs)

        return counted

    def count(self, what: str) -> None:
        frame, site = sys._getframe(2), None
        while frame is not None:
            here = f"{_short(frame.f_code.co_filename)}:{frame.f_code.co_name}"
            if here.startswith(LEFT_OUT) or (site is None and here in LEFT_OUT_ITSELF):
                return
            if site is None and not here.startswith(PASSED_OVER):
                site = here
            frame = frame.f_back
        self.sites[f"{what} at {site}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in READS or _hides_a_shape(name, args):
            self.reads.count(name)
        return func(*args, **kwargs or {})


def _hides_a_shape(name, args):
    """Whether a boolean index makes the operation count what it selects. Filling is masking."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    fills = name != "index" and args[2].numel() == 1
    is_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return is_mask and not fills


class _Functions(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        is_upload = name in UPLOADS and "device" in kwargs and not torch.is_tensor(args[0])
        if name in COPIES or is_upload:
            self.reads.count(name)
        return func(*args, **kwargs)


def _short(file: str) -> str:
    path = Path(file)
    for base in (ROOT, *map(Path, sys.path)):
        if base.name == "site-packages" and path.is_relative_to(base):
            return str(path.relative_to(base))
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
