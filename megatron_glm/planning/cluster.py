"""What a cluster is made of: published figures of GPUs, and the shares of them that are reached."""

from dataclasses import dataclass, replace

from megatron_glm.planning.job import PlanError

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A GPU, dense 16-bit products, and its links; bandwidths in bytes a second."""

    name: str
    peak: float
    """Operations a second of products in bf16 or fp16, without sparsity."""
    best_product: float
    """What the best of large products has been measured to reach, operations a second."""
    memory: float
    """Bytes that a process can see (torch.cuda.mem_get_info)."""
    memory_bandwidth: float
    nvlink: float
    """To the other GPUs of its node, one way."""
    network: float
    """To other nodes, one way: a link of its own in the makers' systems."""
    source: str


def _gpu(name, peak, best, memory, bandwidth, nvlink, network, source) -> GPU:
    """peak, best in TFLOP/s; memory in GiB; bandwidth in TB/s; nvlink, network in GB/s one way."""
    return GPU(
        name, peak * 1e12, best * 1e12, memory * GIB, bandwidth * 1e12, nvlink * 1e9,
        network * 1e9, source,
    )  # fmt: skip


_MAMF = "best product: ml-engineering (Bekman), maximum achievable matmul FLOPS"
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        _gpu("A100-40G", 312, 267.9, 39.4, 1.555, 300, 25,
             f"NVIDIA A100 datasheet; DGX A100 (HDR, 200 Gb/s a GPU); {_MAMF}"),
        _gpu("A100-80G", 312, 267.9, 79.1, 2.039, 300, 25,
             f"NVIDIA A100 datasheet; DGX A100 (HDR, 200 Gb/s a GPU); {_MAMF}"),
        _gpu("H100", 989.4, 792.1, 79.1, 3.35, 450, 50,
             f"NVIDIA H100 SXM datasheet; DGX H100 (NDR, 400 Gb/s a GPU); {_MAMF}"),
        _gpu("H200", 989.4, 766.0, 139.8, 4.8, 450, 50,
             "NVIDIA H200 SXM datasheet; DGX H200 (NDR, 400 Gb/s a GPU); best product: measured, "
             "8192^3 in bf16, torch 2.11"),
        _gpu("B200", 2250, 1745.0, 178.3, 7.67, 900, 50,
             f"NVIDIA HGX B200 datasheet, its driver for memory and bus width; DGX B200 (400 Gb/s "
             f"a GPU); {_MAMF}"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """What a training step reaches of published figures. The shares of products, memory and
    attention were measured on an H200 and are assumed of the others; none is fitted to a run."""

    product: float = 0.88
    """Share of the best product in products of the shapes of GLM's layers: 640 to 714 of 766
    TFLOP/s."""
    memory: float = 0.88
    """Share of the memory's bandwidth in a copy: 4.24 of 4.8 TB/s."""
    attention: float = 0.30
    """Share of the peak in attention, forward and backward, counting the pairs that the mask
    leaves: 299 TFLOP/s by FlexAttention."""
    link: float = 0.80
    """Share of a link's bandwidth in large collectives. Assumed; nccl-tests measures it."""
    host_seconds_per_layer: float = 0.8e-3
    """Time in which the host launches a layer's kernels, forward and backward, below which no GPU
    makes it faster. Assumed: some 100 launches of 8 us."""
    host_seconds_per_pass: float = 0.3e-3
    """Time that each pass of a model chunk stands still while the schedule waits for its
    neighbours' tensors. Assumed."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs."""

    gpu: GPU
    num_nodes: int
    gpus_per_node: int = 8
    efficiency: Efficiency = Efficiency()

    @property
    def world_size(self) -> int:
        """GPUs of the cluster."""
        return self.num_nodes * self.gpus_per_node

    @property
    def product_rate(self) -> float:
        """Operations a second of large products."""
        return self.gpu.best_product * self.efficiency.product

    @property
    def attention_rate(self) -> float:
        """Operations a second of attention, of pairs that the mask leaves."""
        return self.gpu.peak * self.efficiency.attention

    @property
    def memory_rate(self) -> float:
        """Bytes a second read and written."""
        return self.gpu.memory_bandwidth * self.efficiency.memory

    def link_rate(self, span: int) -> float:
        """Bytes a second, one way, among ranks of which the first and the last are `span` apart."""
        is_inside = span <= self.gpus_per_node
        return (self.gpu.nvlink if is_inside else self.gpu.network) * self.efficiency.link


def find_gpu(name: str, **changes: float | None) -> GPU:
    """A GPU by name, with other figures where given (fields of GPU); PlanError for an unknown."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise PlanError(f"--gpu {name}: unknown; use one of {known}, and give what differs")
    return replace(gpu, **{field: value for field, value in changes.items() if value is not None})
