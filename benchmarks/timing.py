"""Time of a step on a device, and the speed of a copy, the yardstick of what memory bounds."""

import statistics
import time
from collections.abc import Callable

import torch

COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 27}
"""Of a copy that no cache holds, by type of device."""


def timed(
    step: Callable[[], object], device: torch.device, repeats: int, *, of_device: bool = False
) -> float:
    """Milliseconds of `step` after two warm-up calls (compilation, autotuning).

    The median on a GPU; the least on a CPU, where other processes only ever add time. of_device:
    on a GPU, without the time that the host takes to launch.
    """
    for _ in range(2):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if of_device:
                # Kernels wait behind this one, some 10 ms long, until all are in the queue.
                torch.cuda._sleep(20_000_000)
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            step()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times) if device.type == "cuda" else min(times)


def copy_gb_per_s(device: torch.device, repeats: int) -> float:
    """Bytes read and written by a copy, 10^9 a second."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = timed(lambda: target.copy_(source), device, repeats, of_device=True)
    return 2e-6 * source.nbytes / ms
