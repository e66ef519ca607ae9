"""Steps of decode as CUDA graphs: one launch in the place of a dozen for each layer.

A step of few rows takes the host longer to launch than the GPU to compute.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import torch

from megatron_glm.inference.kv_cache import padded_rows

logger = logging.getLogger(__name__)

# From inputs int64 [k, rows] to outputs [rows, ...].
Step = Callable[[torch.Tensor], torch.Tensor]


class StepGraphs:
    """A step as one graph for each number of rows that `padded_rows` gives, made when it is needed.

    Where a step cannot be captured, it is run as it is, and the log says so once. enabled: False
    from then on; may be set.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._inputs: dict[int, torch.Tensor] = {}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._memory: Hashable = None
        self._stream = self._pool = None
        self.enabled = True

    def __call__(
        self, step: Step, inputs: Sequence[Sequence[int]], memory: Hashable
    ) -> torch.Tensor:
        """What a step makes of inputs [k, rows], which the next call may overwrite.

        step: always the same one. It is captured: values and lengths it may read on the device
        alone, from its inputs or from memory that stays where it is. Rows may be added to it whose
        inputs are 0. memory: another where what it reads besides its inputs has moved or grown,
        which may change addresses and sizes, but not which kernels a step takes.
        """
        if memory != self._memory:
            self.clear()
            self._memory = memory
        num_rows = len(inputs[0])
        padded = padded_rows(num_rows)
        padding = [0] * (padded - num_rows)
        given = torch.tensor([[*values, *padding] for values in inputs])
        return self._run(step, padded, given)[:num_rows]

    def clear(self) -> None:
        """Drops the graphs. Those that hold collectives must go before their process group, whose
        end NCCL delays to theirs."""
        self._graphs.clear()
        # A pool is at an end with the last graph that uses it.
        self._pool = None

    def _run(self, step: Step, rows: int, given: torch.Tensor) -> torch.Tensor:
        is_first = rows not in self._inputs
        if is_first:
            self._inputs[rows] = torch.empty_like(given, device=self._device)
        inputs = self._inputs[rows]
        inputs.copy_(given)
        # The first time kernels are compiled and ranks connected, which a capture must not do.
        if is_first or not self.enabled:
            return step(inputs)
        if rows not in self._graphs:
            try:
                self._graphs[rows] = self._capture(step, inputs)
            except RuntimeError as error:
                self.enabled = False
                self.clear()
                # At the end of a capture that has failed CUDA says only that it has.
                cause = str(error.__context__ or error).partition("\n")[0]
                logger.warning("decode goes without CUDA graphs, slower with few rows: %s", cause)
                return step(inputs)
        graph, outputs = self._graphs[rows]
        graph.replay()
        return outputs

    def _capture(
        self, step: Step, inputs: torch.Tensor
    ) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        # One stream for all: cuBLAS keeps memory for each that it has seen.
        self._stream = self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # The outer context is left even if a capture ends in an error. Other threads, as NCCL's,
        # may go on with what a capture forbids.
        try:
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, self._pool, self._stream, "thread_local"),
            ):
                outputs = step(inputs)
        except RuntimeError:
            self._end_allocation()
            raise
        return graph, outputs

    def _end_allocation(self) -> None:
        """Takes torch's allocator out of a capture whose end has failed: until then it gives no
        memory back, neither this pool's nor, when memory is short, what else it keeps."""
        device = torch.cuda.current_device()
        # Refused where the capture has ended well, and only the step has not.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
