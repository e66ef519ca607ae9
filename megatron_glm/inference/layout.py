"""Tensor and pipeline parallelism over torch.distributed; without it, one process does it all."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_glm.device import has_gpu
from megatron_glm.errors import GLMError


@dataclass
class Layout:
    """Which part of the model this process holds, and how it talks to the others.

    Ranks of a tensor parallel group are neighbours, as in Megatron: rank = stage * tp_size +
    tp_rank.
    """

    tp_size: int = 1
    pp_size: int = 1
    tp_rank: int = 0
    stage: int = 0
    tp_group: dist.ProcessGroup | None = None
    pp_group: dist.ProcessGroup | None = None

    @staticmethod
    def create(tp_size: int, pp_size: int) -> "Layout":
        """The layout of this process in a started process group of tp_size x pp_size ranks."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != tp_size * pp_size:
            raise GLMError(
                f"--tensor-model-parallel-size {tp_size} x --pipeline-model-parallel-size {pp_size}"
                f" needs {tp_size * pp_size} processes, this run has {world}: start it by torchrun "
                f"--nproc-per-node {tp_size * pp_size}"
            )
        if world == 1:
            return Layout()
        rank = dist.get_rank()
        layout = Layout(tp_size, pp_size, rank % tp_size, rank // tp_size)
        for stage in range(pp_size):
            group = dist.new_group(range(stage * tp_size, (stage + 1) * tp_size))
            if stage == layout.stage:
                layout.tp_group = group
        for tp_rank in range(tp_size):
            group = dist.new_group(range(tp_rank, world, tp_size))
            if tp_rank == layout.tp_rank:
                layout.pp_group = group
        return layout

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.pp_size - 1

    @property
    def is_driver(self) -> bool:
        """True on the one rank that talks to the user."""
        return self.tp_rank == 0 and self.stage == 0

    def layers(self, num_layers: int) -> range:
        """The layers of this stage: all stages the same number, the first ones one more."""
        if num_layers < self.pp_size:
            raise GLMError(
                f"--pipeline-model-parallel-size {self.pp_size}: the model has only {num_layers} "
                "layers"
            )
        each, more = divmod(num_layers, self.pp_size)
        start = self.stage * each + min(self.stage, more)
        return range(start, start + each + (self.stage < more))

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums the parts of a row-parallel product over the tensor parallel ranks, in place."""
        if self.tp_size > 1:
            dist.all_reduce(x, group=self.tp_group)
        return x

    def gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """Joins the tensor parallel ranks' parts of the last dimension."""
        if self.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim=-1)

    def receive(self, like: torch.Tensor) -> torch.Tensor:
        """Hidden states of the stage before, into `like`."""
        dist.recv(like, group=self.pp_group, group_src=self.stage - 1)
        return like

    def send(self, x: torch.Tensor) -> None:
        """Hands hidden states to the stage behind."""
        dist.send(x.contiguous(), group=self.pp_group, group_dst=self.stage + 1)

    def shared(self, values: Iterable[Any]) -> Iterator[Any]:
        """Gives every rank what the driver iterates over; the others' `values` are not touched.

        An error of the driver's iterator is raised on all ranks.
        """
        if self.tp_size * self.pp_size == 1:
            yield from values
            return
        iterator = iter(values) if self.is_driver else None
        while True:
            message = [_next(iterator) if iterator is not None else None]
            dist.broadcast_object_list(message, src=0)
            kind, value = message[0]
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value

    def from_last_stage(self, x: torch.Tensor) -> torch.Tensor:
        """Gives every stage what the last one has, in place."""
        if self.pp_size > 1:
            dist.broadcast(x, group=self.pp_group, group_src=self.pp_size - 1)
        return x


def _next(iterator: Iterator[Any]) -> tuple[str, Any]:
    try:
        return "value", next(iterator)
    except StopIteration:
        return "end", None
    except Exception as error:
        return "error", error


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the process group that torchrun has described, if it has, and leaves it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
        # One that leaves early breaks a collective in which others still are.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def default_device() -> torch.device:
    """This process's GPU, or the CPU where there is none; see `has_gpu`."""
    if not has_gpu():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
