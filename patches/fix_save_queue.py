"""The first save of a run starts a helper process that imports the whole program again."""

from collections.abc import Callable
from functools import wraps
from queue import Queue
from typing import Any
from unittest import mock

from patches.patch import Patch, Target


def in_process(get_write_results_queue: Callable) -> Callable:
    """A plain queue where this process writes by itself, as it does unless a save is asynchronous.

    The asynchronous worker names its `mp_mode` when it starts, before any save.
    """

    @wraps(get_write_results_queue)
    def get(mp_mode: str | None = None) -> Any:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if mp_mode is None and filesystem_async._results_queue is None:
            return Queue()
        return get_write_results_queue(mp_mode or "spawn")

    return get


def reproduces() -> bool:
    """True where a synchronous save asks for another process."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    with (
        mock.patch.object(filesystem_async.mp, "get_context") as get_context,
        mock.patch.object(filesystem_async, "_results_queue", None),
    ):
        filesystem_async.get_write_results_queue()
    return get_context.called


PATCH = Patch(
    reason="threads hand their results to the same process through a queue that a spawned manager "
    "keeps: 3 to 14 s at the first save on each rank of a CPU run, and a process that a kill "
    "leaves behind",
    upstream="not reported",
    versions={"megatron-core": "==0.19.*"},
    when="always",
    targets=(
        Target(
            "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
            "e395fb0e86a062e2",
            in_process,
        ),
    ),
    reproduces=reproduces,
)
