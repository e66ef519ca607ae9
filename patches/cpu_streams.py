"""Megatron runs work beside the main stream; on the CPU there is one order of execution."""

import contextlib
import time

import torch

from patches.patch import Patch, Target, constant


class Stream:
    """A stream that is never behind."""

    def __init__(self, device: object = None, priority: int = 0, **_: object):
        self.device = torch.device("cpu")

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority: there is one."""
        return 0, 0

    def synchronize(self) -> None:
        """Nothing is under way."""

    def query(self) -> bool:
        """Whether everything submitted has run."""
        return True

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """The time of the call, as an event."""
        event = event or Event()
        event.record()
        return event


class Event:
    """A moment on the program's own clock."""

    def __init__(self, **_: object):
        self.seconds = None

    def record(self, stream: object = None) -> None:
        """Note the time."""
        self.seconds = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Whether everything before the event has run."""
        return True

    def synchronize(self) -> None:
        """Nothing is under way."""

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to `end`."""
        return 1000.0 * (end.seconds - self.seconds)


_only = Stream()


def current_stream(device: object = None) -> Stream:
    """The order of the program itself."""
    return _only


def set_stream(stream: object) -> None:
    """Nothing to choose."""


def stream(stream: object) -> contextlib.AbstractContextManager:
    """A context in which nothing changes."""
    return contextlib.nullcontext()


def is_current_stream_capturing() -> bool:
    """No CUDA graph is ever recorded."""
    return False


def reproduces() -> bool:
    """True where a stream cannot be had without a GPU."""
    try:
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    except (RuntimeError, AssertionError):
        return True
    return False


PATCH = Patch(
    reason="DDP, the distributed optimizer and the timers order their work by streams and events, "
    "which torch.cuda cannot make without a GPU",
    upstream="not reported",
    versions={"torch": "==2.11.*"},
    when="no GPU",
    targets=(
        Target("torch.cuda:Stream", "f5b9547b46603680", constant(Stream)),
        Target("torch.cuda:Event", "f5fe051e2c600d1f", constant(Event)),
        Target("torch.cuda:current_stream", "ca5387f64ee12c98", constant(current_stream)),
        Target("torch.cuda:default_stream", "b0a2135268c651ca", constant(current_stream)),
        Target("torch.cuda:set_stream", "6f7a1ab4ffc3f51f", constant(set_stream)),
        Target("torch.cuda:stream", "a701c622b6f531dc", constant(stream)),
        Target(
            "torch.cuda:is_current_stream_capturing",
            "46ad9fe4332b954e",
            constant(is_current_stream_capturing),
        ),
    ),
    reproduces=reproduces,
)
