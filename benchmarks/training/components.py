"""Where the time of a training step goes, from torch's profiler: kernels classified by name.

A kernel whose own name says too little (an element-wise one) is classified by the operations that
it was launched from. Without a GPU the operations themselves are classified, by their own time.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What the steps of this package mark as their optimizer, beside what torch marks by itself.
OPTIMIZER = "Optimizer.step of Megatron"
OTHER = "element_wise"
IDLE = "idle"
# The first pattern that is found in the name of a kernel or of what launched it.
PATTERNS = {
    "communication": r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter",
    "optimizer": r"Optimizer\.|multi_tensor|fused_adam|adamw|aten::_foreach",
    "cross_entropy": r"cross_?entropy|nll_loss|log_?softmax",
    # Batched products and the softmax belong to unfused attention: nothing else here has them.
    "attention": r"attention|flash|fmha|sdpa|softmax|aten::(baddbmm|bmm|masked_fill)"
                 r"|_SplitRanges|_Chunked",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|aten::(mm|addmm|matmul|linear)$"
                r"|weight_?gradient",
}  # fmt: skip
COMPONENTS = (*PATTERNS, OTHER, IDLE)


def component(name: str, launched_from: Iterable[str] = ()) -> str:
    """Component of a kernel called `name`, launched inside the operations `launched_from`."""
    names = (name, *launched_from)
    for part, pattern in PATTERNS.items():
        if any(re.search(pattern, each, re.IGNORECASE) for each in names):
            return part
    return OTHER


def profiled(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Milliseconds of each of COMPONENTS in one call of `step`; streams that overlap both count."""
    recorder = start_profile(device)
    step()
    return stop_profile(recorder, device)


def start_profile(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    recorder = profile(activities=activities, acc_events=True)
    recorder.__enter__()
    return recorder


def stop_profile(recorder: profile, device: torch.device) -> dict[str, float]:
    """Ends a profile and returns milliseconds of each of COMPONENTS since its start."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    recorder.__exit__(None, None, None)
    events = recorder.events()
    times = kernel_times(events) if device.type == "cuda" else operation_times(events)
    return {part: times[part] / 1e3 for part in COMPONENTS}


def kernel_times(events: Sequence) -> Counter:
    """Microseconds of kernels by component; idle is the time between them."""
    times: Counter = Counter()
    unknown: Counter = Counter()
    spans = []
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end))
            unknown[event.name] += event.time_range.elapsed_us()
    for event in events:
        if event.device_type == DeviceType.CPU and event.kernels:
            chain = callers(event)
            for kernel in event.kernels:
                times[component(kernel.name, chain)] += kernel.duration
                unknown[kernel.name] -= kernel.duration
    for name, left in unknown.items():
        # Kernels that no operation launched, as those of a graph.
        times[component(name)] += max(left, 0)
    times[IDLE] = gaps(spans)
    return times


def operation_times(events: Sequence) -> Counter:
    """Microseconds of operations' own time by component; idle is what lies outside of them."""
    times: Counter = Counter()
    spans = []
    for event in events:
        if event.device_type == DeviceType.CPU:
            times[component(event.name, callers(event)[1:])] += event.self_cpu_time_total
            spans.append((event.time_range.start, event.time_range.end))
    times[IDLE] = gaps(spans)
    return times


def callers(event) -> list[str]:
    """Names of an operation and of those that it was called in."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def gaps(spans: list[tuple[float, float]]) -> float:
    """Time between the first start and the last end that no span covers."""
    uncovered, reached = 0.0, None
    for start, end in sorted(spans):
        if reached is not None and start > reached:
            uncovered += start - reached
        reached = end if reached is None else max(reached, end)
    return uncovered
