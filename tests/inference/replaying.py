"""Stands in for CUDA graphs on a CPU: what a step does is recorded once and done again.

As a graph does, a recording knows the addresses, shapes and numbers that were there when it was
made, and nothing of the Python around it; recording a step leaves no trace of its results. Kernels
must be Triton's interpreter's. What it cannot show: that CUDA allows a call during a capture, and
that memory which a step frees on its way is taken again.
"""

from collections.abc import Callable
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

from megatron_glm.inference.step_graphs import StepGraphs
from tests.host_reads import READS

# Operations that wait for the device: reads by the host, some by other names without gradients,
# and tensors of the host's numbers.
REFUSED = READS | {"item", "is_nonzero", "lift_fresh"}


class RecordedGraphs(StepGraphs):
    """`StepGraphs` whose graphs are recordings."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.num_captures = 0

    def _capture(self, step, inputs):
        self.num_captures += 1
        recording = Recording()
        with recording:
            outputs = step(inputs)
        return recording, outputs


class Recording(TorchDispatchMode):
    """Operations and launches on the tensors that they were called with; `replay` repeats them."""

    def __init__(self):
        super().__init__()
        self._actions: list[Callable[[], object]] = []
        self._results: list[torch.Tensor] = []
        self._found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._launches = mock.patch.object(InterpretedFunction, "run", self._launch_of)

    def __enter__(self):
        self._launches.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._launches.stop()
        for result in self._results:
            result.fill_(float("nan") if result.is_floating_point() else -(10**6))
        for storage, before in self._found.values():
            storage.copy_(before)

    def replay(self) -> None:
        for action in self._actions:
            action()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = _tensors((args, kwargs))
        if name in REFUSED:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        self._keep(given)
        outputs = func(*args, **kwargs)
        storages = {tensor.untyped_storage().data_ptr() for tensor in given}
        new = [out for out in _tensors(outputs) if out.untyped_storage().data_ptr() not in storages]
        self._results += new

        def again():
            results = _tensors(func(*args, **kwargs))
            for target, result in zip(_tensors(outputs), results, strict=True):
                if any(target is out for out in new):
                    target.copy_(result)

        self._actions.append(again)
        return outputs

    @property
    def _launch_of(self):
        run = InterpretedFunction.run

        def launch(kernel, *args, **kwargs):
            with _disable_current_modes():
                self._keep(_tensors((args, kwargs)))
                run(kernel, *args, **kwargs)
            self._actions.append(lambda: run(kernel, *args, **kwargs))

        return launch

    def _keep(self, tensors) -> None:
        """Notes what memory from outside of the step holds, to put it back."""
        made = {result.untyped_storage().data_ptr() for result in self._results}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in made and address not in self._found:
                with _disable_current_modes():
                    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                    self._found[address] = whole, whole.clone()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
