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
