"""One rank of any run on this machine: Megatron's own code on tensors without data.

The modules, the wrapper with its gradient buffers and the pipeline schedule are those of training
at their real size. Tensors are on the meta device, process groups only pretend, and Triton kernels
are not launched; what remains is which tensor lives when, and that is counted. A whole rank of
GLM-130B takes seconds.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from megatron_glm.model.attention import triton as triton_attention
from megatron_glm.model.config import GLMModelConfig, GLMTransformerConfig
from megatron_glm.model.glm_model import GLMModel, GLMModelBuilder
from megatron_glm.planning.job import Job
from megatron_glm.planning.parameters import is_first, is_last

META = torch.device("meta")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors without data that are alive, operation by operation."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.largest: list[tuple[int, tuple, torch.dtype, str]] = []
        """At the peak: bytes, shape, dtype and maker of every tensor."""
        self._storages: dict[int, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                self._add(tensor, str(func))
        return result

    def _add(self, tensor: Tensor, maker: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def forget(_):
            self.live -= size
            del self._storages[key]

        what = (size, tuple(tensor.shape), tensor.dtype, maker)
        self._storages[key] = (weakref.ref(storage, forget), what)
        self.live += size
        if self.live > self.peak:
            self.peak = self.live
            self.largest = sorted((w for _, w in self._storages.values()), key=lambda w: -w[0])


@dataclass
class SimulatedRank:
    """Bytes of one simulated step."""

    state: int
    """Parameters and gradient buffers."""
    peak: int
    """Beside these, at the worst moment of forward and backward passes."""
    largest: list[tuple[int, tuple, torch.dtype, str]]


def simulate(job: Job, stage: int) -> SimulatedRank:
    """Forward and backward passes of one step on a rank of a stage, without optimizer."""
    with _rank(job, stage), LiveBytes() as counter:
        chunks = [_wrap(job, chunk) for chunk in _build(job)]
        state, counter.peak = counter.live, 0
        get_forward_backward_func()(
            forward_step_func=_forward_step(job, stage),
            data_iterator=[None] * len(chunks) if len(chunks) > 1 else None,
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=job.num_microbatches,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            forward_only=False,
        )
    return SimulatedRank(state, counter.peak - state, counter.largest)


def kept_by_autograd(model: torch.nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass, by storage, parameters left out."""
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    output = forward()
    assert output.requires_grad
    once, again = _saved(output), _saved(output)
    # What is made when it is asked for is another one each time.
    return sum(once[key].nbytes() for key in (once.keys() & again.keys()) - weights)


def _saved(output: Tensor) -> dict[int, torch.UntypedStorage]:
    """What the operations behind a tensor have for their backward passes, by its identity."""
    nodes, found, storages = [output.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in found:
            continue
        found.add(node)
        nodes += [before for before, _ in node.next_functions]
        for name in dir(node):
            if name == "saved_tensors" or name.startswith("_saved_"):
                for tensor in tree_leaves(getattr(node, name)):
                    if isinstance(tensor, Tensor):
                        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
    return storages


def kept_bytes(job: Job, stage: int, chunk: int = 0) -> int:
    """Bytes that autograd keeps of one micro-batch in a chunk."""
    with _rank(job, stage):
        model = _build(job)[chunk]
        if not is_first(job, stage, chunk):
            t = job.tensor_model_parallel_size if job.sequence_parallel else 1
            shape = (job.seq_length // t, job.micro_batch_size, job.hidden_size)
            model.set_input_tensor(
                torch.empty(shape, dtype=DTYPES[job.dtype], device=META, requires_grad=True)
            )
        return kept_by_autograd(model, lambda: _forward_step(job, stage)(None, model)[0])


def parameters_of(job: Job, stage: int) -> list[list[torch.nn.Parameter]]:
    """The parameters, which know their `name_in_model`, of every chunk of a stage."""
    with _rank(job, stage):
        chunks = _build(job)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.name_in_model = name
    return [list(chunk.parameters()) for chunk in chunks]


def _build(job: Job) -> list[GLMModel]:
    names = (
        "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
        "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel",
        "virtual_pipeline_model_parallel_size", "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split", "recompute_granularity", "recompute_method",
        "recompute_num_layers", "distribute_saved_activations", "hidden_dropout",
        "attention_dropout", "glm_fused_kernels", "glm_recompute_norms_and_geglu",
    )  # fmt: skip
    config = GLMTransformerConfig(
        **{name: getattr(job, name) for name in names},
        num_layers_in_first_pipeline_stage=job.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=job.decoder_last_pipeline_num_layers,
        recompute_modules=list(job.recompute_modules) or None,
        params_dtype=DTYPES[job.dtype], pipeline_dtype=DTYPES[job.dtype],
        bf16=job.dtype == "bf16", fp16=job.dtype == "fp16",
        perform_initialization=False, deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True, gradient_accumulation_fusion=True,
    )  # fmt: skip
    builder = GLMModelBuilder(
        GLMModelConfig(
            transformer=config, vocab_size=job.padded_vocab_size, seq_length=job.seq_length
        )
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    vp = job.virtual_pipeline_model_parallel_size
    return [builder.build_model(groups, vp_stage=n) for n in ([None] if vp is None else range(vp))]


def _wrap(job: Job, model: GLMModel) -> DistributedDataParallel:
    return DistributedDataParallel(
        model.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=job.accumulate_allreduce_grads_in_fp32),
        model,
    )


def _forward_step(job: Job, stage: int):
    s, b = job.seq_length, job.micro_batch_size
    samples = torch.tensor([[[s // 2], [s]]] * b, dtype=torch.int32)

    def forward_step(_, model):
        chunk = unwrap_model(model).vp_stage or 0
        ids = torch.empty(b, s, dtype=torch.int64, device=META)
        # The most that a micro-batch may have: every token a target.
        targets = {"labels": ids, "target_rows": torch.empty_like(ids).flatten()}
        output = model(
            ids if is_first(job, stage, chunk) else None, ids, samples,
            **(targets if is_last(job, stage, chunk) else {}),
        )  # fmt: skip
        count = torch.ones((), dtype=torch.int32)
        return output, lambda losses: (losses.float().sum(), count, {})

    return forward_step


def _dropout_as_on_a_gpu(x, p=0.5, training=True, inplace=False):
    """Keeps a mask of one byte an element; on other devices torch keeps factors in x's dtype."""
    return torch.native_dropout(x, p, True)[0] if training and p else x


@contextlib.contextmanager
def _rank(job: Job, stage: int) -> Iterator[None]:
    """Everything as on the first rank of a stage of the whole run."""
    rank = stage * (job.world_size // job.pipeline_model_parallel_size)
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=rank, world_size=job.world_size)
    try:
        parallel_state.initialize_model_parallel(
            job.tensor_model_parallel_size, job.pipeline_model_parallel_size,
            job.virtual_pipeline_model_parallel_size, create_gloo_process_groups=False,
        )  # fmt: skip
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        with contextlib.ExitStack() as stack:
            for target, replacement in {
                "torch.cuda.current_device": lambda: META,
                "torch.distributed.batch_isend_irecv": lambda operations: [],
                "torch.nn.functional.dropout": _dropout_as_on_a_gpu,
                "torch.fx.experimental._config.meta_nonzero_assume_all_nonzero": True,
                "megatron_glm.model.attention.core_attention.select_backend":
                    lambda name, device: triton_attention.attention,
                "megatron_glm.model.fused.selection.DEVICES": ("cuda", "meta"),
                "megatron_glm.model.weight_gradient.wgrad_gemm_accum_fp32": lambda *tensors: None,
            }.items():
                stack.enter_context(patch(target, replacement))
            stack.enter_context(patch.object(JITFunction, "run", lambda self, *a, **k: None))
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
