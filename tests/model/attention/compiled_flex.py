"""FlexAttention compiled as on a GPU, for a CPU: its graphs are counted and run as they are."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from megatron_glm.model.attention import flex


def is_static(inputs: list) -> bool:
    """Whether a graph is compiled for these sizes and strides alone."""
    return all(
        isinstance(x, Tensor) and all(type(n) is int for n in (*x.shape, *x.stride()))
        for x in inputs
    )


@contextmanager
def compiled_flex(monkeypatch) -> Iterator[list[bool]]:
    """While entered, what torch compiles: of each graph whether it is static."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(is_static(inputs))
        return graph.forward

    torch.compiler.reset()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        kernel = flex._kernel.__wrapped__("cuda")
    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)
    # Without it there is no backward pass on a CPU.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("default"):
        yield graphs
