"""One engine for many clients at once: requests join and leave a running batch."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from megatron_glm.errors import GLMError
from megatron_glm.inference.blanks import Prompt
from megatron_glm.inference.generation import Batch, Filler, take_fitting
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.search import Search, SearchConfig

# Other ranks wait for the driver in a collective, which would time out.
_HEARTBEAT_S = 60.0


class OverloadedError(GLMError):
    """More requests wait than the service takes in."""


class StoppedError(RuntimeError):
    """The service takes no requests any more."""


class Request(NamedTuple):
    """A prompt on its way to all ranks; number: its name there."""

    number: int
    prompt: Prompt
    config: SearchConfig


class Commands(NamedTuple):
    """What every rank does before its next step: requests that join the batch, numbers of those
    that leave it."""

    join: Sequence[Request] = ()
    leave: Sequence[int] = ()


class Listener(Protocol):
    """Hears of one request, in the thread of the engine; must not block."""

    def progress(self, generated: tuple[int, ...]) -> None: ...

    def finished(self, search: Search) -> None: ...

    def failed(self, error: BaseException) -> None: ...


Heard = Callable[[dict[int, Search]], None]


def follow(filler: Filler, layout: Layout, commands: Iterable[Commands], heard: Heard) -> None:
    """The loop of every rank: obeys the driver's commands and takes a step after each.

    commands: read on the driver alone. heard: called after each step with what took part, by
    number; the `finish_reason` of a search says whether it is over.
    """
    batch = Batch(filler.engine)
    running: dict[int, Search] = {}
    for join, leave in layout.shared(commands):
        batch.remove([running.pop(number) for number in leave if number in running])
        joining = {number: filler.search(prompt, config) for number, prompt, config in join}
        batch.add(list(joining.values()))
        running |= joining
        if running:
            batch.step()
        heard(running)
        running = {number: s for number, s in running.items() if not s.finish_reason}


class Service:
    """The driver's end: takes requests from any thread, and runs the engine in one of its own.

    max_rows: rows of a batch, see `take_fitting`. max_waiting: requests that may wait for a place.
    stopped: called in the engine's thread when it has ended, whatever the reason; `error` is that
    reason, None after `stop`.
    """

    def __init__(
        self,
        filler: Filler,
        layout: Layout,
        max_rows: int,
        max_waiting: int,
        stopped: Callable[[], None] = lambda: None,
    ):
        self.filler, self.layout, self.stopped = filler, layout, stopped
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.error: BaseException | None = None
        self._listeners: dict[int, Listener] = {}
        self._waiting: deque[Request] = deque()
        self._running: dict[int, int] = {}  # rows of each request by its number
        self._leaving: list[int] = []
        self._next_number = 0
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine's thread after the step that it is in; what is left fails."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_running(self) -> bool:
        """True while requests are taken in."""
        return not self._is_stopping

    @property
    def load(self) -> tuple[int, int]:
        """Requests that are in the batch, and that wait."""
        with self._changed:
            return len(self._running), len(self._waiting)

    def submit(self, prompt: Prompt, config: SearchConfig, listener: Listener) -> int:
        """Takes in a request and returns its number.

        GLMError where it cannot be answered, OverloadedError where too many wait, StoppedError.
        """
        if config.num_beams > self.max_rows:
            raise GLMError(f"num_beams {config.num_beams}: at most {self.max_rows} here")
        self.filler.search(prompt, config)
        with self._changed:
            if not self.is_running:
                raise StoppedError("the server is stopping")
            if len(self._waiting) >= self.max_waiting:
                raise OverloadedError(f"{self.max_waiting} requests wait already: try again later")
            number = self._next_number
            self._next_number += 1
            self._listeners[number] = listener
            self._waiting.append(Request(number, prompt, config))
            self._changed.notify()
        return number

    def cancel(self, number: int) -> None:
        """Drops a request; nothing happens if it is over."""
        with self._changed:
            if self._listeners.pop(number, None) is None:
                return
            if number in self._running:
                self._leaving.append(number)
            else:
                self._waiting = deque(r for r in self._waiting if r.number != number)

    def _run(self) -> None:
        try:
            follow(self.filler, self.layout, self._commands(), self._heard)
        except BaseException as error:
            self.error = error
        with self._changed:
            self._is_stopping = True
            listeners = list(self._listeners.values())
            self._listeners.clear()
        for listener in listeners:
            listener.failed(self.error or StoppedError("the server has stopped"))
        self.stopped()

    def _commands(self) -> Iterator[Commands]:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_stopping or self._waiting or self._running, _HEARTBEAT_S
                )
                if self._is_stopping:
                    return
                leave, self._leaving = self._leaving, []
                for number in leave:
                    self._running.pop(number, None)
                num_rows = sum(self._running.values())
                join = take_fitting(self._waiting, num_rows, self.max_rows)
                self._running |= {request.number: request.config.num_beams for request in join}
            yield Commands(join, leave)

    def _heard(self, running: dict[int, Search]) -> None:
        with self._changed:
            heard = [(self._listeners.get(number), search) for number, search in running.items()]
            for number, search in running.items():
                if search.finish_reason:
                    self._listeners.pop(number, None)
                    self._running.pop(number, None)
        for listener, search in heard:
            if listener is None:
                continue
            if search.finish_reason:
                listener.finished(search)
            else:
                listener.progress(search.best.generated)
