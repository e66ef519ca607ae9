"""One rank of a large job by itself: `pretrain_glm.py` on a process group that only pretends.

Megatron's own schedule, optimizer and sharding run as on that rank, with as many micro-batches in
flight. Collectives give back what this rank has put in, so numbers stay finite; the neighbours in
the pipeline answer at once, with random activations and gradients.
"""

from benchmarks.training import megatron_loop  # isort: skip

import os

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor
from torch.distributed import ProcessGroup

import pretrain_glm
from benchmarks.training import glm
from benchmarks.training.turns import Task, Turns

assert megatron_loop  # It applies the patches.


def run(task: Task, turns: Turns) -> None:
    """Trains until the driver stops it; options: `layout` (TP, PP, DP) and `stage`."""
    tensor, pipeline, data = task.options["layout"]
    os.environ |= {
        "RANK": str(task.options["stage"] * tensor * data),
        "WORLD_SIZE": str(tensor * pipeline * data),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    P2PCommunicator._communicate = _answer_at_once
    # The others would have to have read something.
    pretrain_glm.compare_read_data = lambda group, iteration: None
    for module in (layers, mappings):
        module.dist_reduce_scatter_func = _keep_own_part
    flags = (
        "--fake-process-group", "--use-distributed-optimizer",
        "--tensor-model-parallel-size", str(tensor), "--pipeline-model-parallel-size",
        str(pipeline), "--global-batch-size", str(task.size.num_sequences * data),
    )  # fmt: skip
    glm.run(task._replace(flags=(*flags, *task.flags)), turns)


def _keep_own_part(
    output: Tensor, whole: Tensor, group: ProcessGroup, async_op: bool = False
) -> "_Done":
    """In the place of a reduce-scatter, of which the fake group leaves the output as it was."""
    output.copy_(whole.chunk(group.size())[group.rank()])
    return _Done()


class _Done:
    """The handle of a communication that is over."""

    def wait(self) -> None:
        pass


def _answer_at_once(
    self, *, tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape,
    wait_on_reqs=True,
):  # fmt: skip
    """In the place of a communication with the neighbours; as Megatron's, (prev, next, handles),
    which under interleaving are a dict."""

    def received(wanted: bool, scale: float) -> Tensor | None:
        if not wanted:
            return None
        shape = tuple(tensor_shape)
        values = torch.randn(
            shape, dtype=self.config.pipeline_dtype, device=torch.cuda.current_device()
        )
        return (values * scale).requires_grad_()

    # Activations are of order one, gradients of a summed loss are small.
    return received(recv_prev, 1.0), received(recv_next, 1e-3), {}
