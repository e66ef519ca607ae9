"""FlexAttention as it runs on a CPU: uncompiled, and with the backward that it forbids there."""

import pytest
import torch
from torch.nn.attention import flex_attention


@pytest.fixture(autouse=True)
def uncompiled_flex_attention(request, monkeypatch):
    """The dense backward that FlexAttention has for debugging, without seconds of compilation."""
    # Not by the machine: tests of the CPU run where there is a GPU as well.
    if request.node.get_closest_marker("gpu"):
        yield
        return
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    with torch.compiler.set_stance("force_eager"):
        yield
