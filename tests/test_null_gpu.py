"""What a GPU that computes nothing still notices."""

from tests.null_gpu import run_on_null_gpu

PROGRAM = """
import torch
from megatron_glm.model.fused.residual_norm_kernels import row_means
from tests.null_gpu import num_waits

def waits(action):
    before = num_waits()
    action()
    return num_waits() - before

x, host = torch.ones(2, device="cuda"), torch.ones(2)
pinned = host.pin_memory()
assert waits(x[0].item) > 0 and waits(torch.cuda.synchronize) > 0
assert waits(lambda: host.to("cuda", non_blocking=True)) > 0
assert waits(lambda: pinned.to("cuda", non_blocking=True).exp().sum()) == 0
assert torch.equal(pinned.to("cuda").cpu(), host)

def launch(blocks):
    row_means[(1, blocks)](*[x] * 8, COLUMNS=2, BLOCK=16)

launch(65535)
for refused in (lambda: launch(65536), lambda: torch.dot(x, host),
                lambda: torch.empty(2**40, device="cuda")):
    try:
        refused()
    except RuntimeError as error:
        print(str(error)[:90].splitlines()[0])
"""


def test_waits_limits_devices_and_memory():
    done = run_on_null_gpu(PROGRAM)
    assert done.returncode == 0, done.stderr
    limits, devices, memory = done.stdout.splitlines()
    assert "limits of the device" in limits
    assert "same device" in devices
    assert "out of memory" in memory


CAPTURES = """
import torch
from tests.null_gpu import count_of

x, stream = torch.ones(4, device="cuda"), torch.cuda.Stream()

def capture(action, mode="thread_local"):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, None, stream, mode):
        action()
    return graph

def replay(graph):
    names = "launches", "graph_launches", "nodes_launched"
    before = [count_of(name) for name in names]
    graph.replay()
    print(*(count_of(name) - then for name, then in zip(names, before)))

replay(capture(lambda: (x + 1).exp()))
# Memory that torch takes from CUDA for a graph is taken in a mode that allows it.
replay(capture(lambda: torch.empty(10**8, device="cuda").add_(1)))
for refused in (x[0].item, torch.cuda.synchronize, lambda: torch.empty(2**40, device="cuda"),
                lambda: torch.ones(1).to("cuda")):
    try:
        capture(refused)
    except RuntimeError as error:
        print(str(error.__context__ or error).splitlines()[0][:70])
(x + 1).cpu()
"""


def test_what_a_capture_allows():
    done = run_on_null_gpu(CAPTURES)
    assert done.returncode == 0, done.stderr
    few, much, *refusals = done.stdout.splitlines()
    assert (few, much) == ("0 1 2", "0 1 1")
    assert len(refusals) == 4
    assert all("capturing" in refusals[i] for i in (0, 1))
    assert "out of memory" in refusals[2] and "during CUDA graph capture" in refusals[3]
