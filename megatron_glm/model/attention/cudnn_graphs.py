"""cuDNN's fused attention over ragged rows, by its graph interface.

A row is a run of queries and a run of keys of one sequence; where they begin and how many they are
lies in tensors on the device. So a graph is built once for a shape, whatever the packs, and nothing
is read on the host. Needs `pip install nvidia-cudnn-frontend`; torch brings cuDNN itself.
"""

import threading
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_glm.errors import GLMError

_thread = threading.local()


class Part(NamedTuple):
    """Rows of attention, int32 [r] each: tokens and numbers of their queries and keys."""

    query_start: Tensor
    query_length: Tensor
    key_start: Tensor
    key_length: Tensor
    alignment: str | None
    """None where a query sees all keys of its row. Otherwise those up to its own place, counted
    from the beginning (TOP_LEFT) or from the end (BOTTOM_RIGHT) of both."""


class Form(NamedTuple):
    """What a graph is built for: all that is not in a tensor."""

    is_forward: bool
    alignment: str | None
    rate: float
    softmax_scale: float
    dtype: torch.dtype
    rows: int
    shape: tuple[int, int, int, int]
    """[s, b, n, d] of query, key and value."""
    strides: tuple[tuple[int, ...], ...]
    """Of query, key and value; everything else is contiguous."""
    device: int
    is_deterministic: bool
    """Whether gradients of queries are summed in the same order on every run."""


# Names of the tensors of a graph, and the numbers by which cuDNN knows them.
NAMES = (
    "query", "key", "value", "out", "lse", "grad", "dq", "dk", "dv", "query_length", "key_length",
    "query_offset", "key_offset", "value_offset", "out_offset", "lse_offset", "dk_offset",
    "seed", "seed_offset",
)  # fmt: skip
UIDS = {name: number for number, name in enumerate(NAMES, start=1)}


def run(form: Form, tensors: dict[str, Tensor]) -> None:
    """Run the graph of `form` on tensors by their names in NAMES, on the current stream."""
    cudnn = _import()
    graph = _graph(form)
    device = torch.device("cuda", form.device)
    handle = _handle(form.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=device)
    pointers = {UIDS[name]: tensor.data_ptr() for name, tensor in tensors.items()}
    graph.execute(pointers, workspace.data_ptr(), handle=handle)


def offsets(start: Tensor, x: Tensor) -> Tensor:
    """Elements from the beginning of x, [s, b, ...], to the tokens `start`, int32 [r].

    Rows are those of sequence 0, then of sequence 1 and so on. int64 [r + 1], as cuDNN wants it;
    the last is unused, since lengths are given.
    """
    batch = torch.arange(x.shape[1], device=start.device)
    sequence = batch.repeat_interleave(start.numel() // x.shape[1])
    return torch.nn.functional.pad(start.long() * x.stride(0) + sequence * x.stride(1), (0, 1))


@cache
def _graph(form: Form):
    cudnn = _import()
    io = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[form.dtype]
    integer, wide, single = cudnn.data_type.INT32, cudnn.data_type.INT64, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(
        io_data_type=io, intermediate_data_type=single, compute_data_type=single,
        handle=_handle(form.device),
    )
    seq_length, batch, heads, dim = form.shape
    contiguous = (batch * heads * dim, heads * dim, dim, 1)

    def declare(name, dims, stride, dtype, **more):
        tensor = graph.tensor(name=name, dim=dims, stride=stride, data_type=dtype, **more)
        return tensor.set_uid(UIDS[name])

    def vector(name, size, dtype):
        return declare(name, [size, 1, 1, 1], [1, 1, 1, 1], dtype)

    ragged = {
        f"{name}_offset": vector(f"{name}_offset", form.rows + 1, wide)
        for name in ("query", "key", "value", "out", "lse", *(["dk"] * (not form.is_forward)))
    }

    def geometry(strides, last=dim):
        # cuDNN's order is row, head, token, element; offsets replace the stride of rows.
        token, _, head, _ = strides
        return [form.rows, heads, seq_length, last], [seq_length * token, head, token, 1]

    def tensor(name, strides=contiguous):
        dims, stride = geometry(strides)
        offset = name if name in ("query", "key", "value") else "out"
        return declare(name, dims, stride, io, ragged_offset=ragged[f"{offset}_offset"])

    def output(tensor, name, dtype, offset, dims, stride):
        tensor.set_output(True).set_dim(dims).set_stride(stride).set_data_type(dtype)
        tensor.set_ragged_offset(ragged[f"{offset}_offset"]).set_uid(UIDS[name])

    inputs = {
        short: tensor(name, strides)
        for short, name, strides in zip(
            "qkv", ("query", "key", "value"), form.strides, strict=True
        )
    }
    options = {
        "attn_scale": form.softmax_scale,
        "use_padding_mask": True,
        "seq_len_q": vector("query_length", form.rows, integer),
        "seq_len_kv": vector("key_length", form.rows, integer),
    }
    if form.alignment is not None:
        options["diagonal_alignment"] = getattr(cudnn.diagonal_alignment, form.alignment)
        options["diagonal_band_right_bound"] = 0
    if form.rate:
        options["dropout"] = (form.rate, vector("seed", 1, wide), vector("seed_offset", 1, wide))
    lse_geometry = geometry((batch * heads, heads, 1, 1), last=1)
    if form.is_forward:
        out, lse = graph.sdpa(**inputs, is_inference=False, **options)
        output(out, "out", io, "out", *geometry(contiguous))
        output(lse, "lse", single, "lse", *lse_geometry)
    else:
        lse = declare("lse", *lse_geometry, single, ragged_offset=ragged["lse_offset"])
        gradients = graph.sdpa_backward(
            **inputs, o=tensor("out"), dO=tensor("grad"), stats=lse, **options,
            # Without it cuDNN sums gradients in memory for the longest row times the rows. What it
            # reserves is this many strides of a token and a row, which has to reach the last one.
            max_total_seq_len_q=seq_length + 1, max_total_seq_len_kv=seq_length + 1,
            use_deterministic_algorithm=form.is_deterministic,
        )
        for gradient, name, offset in zip(
            gradients, ("dq", "dk", "dv"), ("out", "dk", "dk"), strict=True
        ):
            output(gradient, name, io, offset, *geometry(contiguous))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


def _handle(device: int):
    """This thread's handle on a device: autograd's backward runs in a thread of its own."""
    handles = _thread.__dict__.setdefault("handles", {})
    if device not in handles:
        handles[device] = _import().create_handle()
    return handles[device]


@cache
def _import():
    try:
        import cudnn
    except ImportError as error:
        raise GLMError(
            f"--glm-attention-backend cudnn: {error}; pip install nvidia-cudnn-frontend, or take "
            "another backend"
        ) from None
    return cudnn
