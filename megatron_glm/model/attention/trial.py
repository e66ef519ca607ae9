"""Which backend trains fastest on this GPU at the shape of the run? Timed before training."""

import logging
import math
from collections.abc import Callable

import torch
from megatron.core.utils import log_single_rank
from triton.testing import do_bench

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import NO_DROPOUT, load_backend
from megatron_glm.model.attention.bounds import make_samples
from megatron_glm.model.attention.conformance import AttentionSetup
from megatron_glm.model.dropout import fixed_dropout

logger = logging.getLogger(__name__)

CANDIDATES = ("triton", "flash", "cudnn", "flex")
WITHOUT_DROPOUT = (*NO_DROPOUT, "flex")
"""FlexAttention takes twice the work for dropout: not worth the time to compile it twice."""
CONTEXT_SHARE = 0.4
"""Of a sample, as in the mean of [gMASK]."""
PLACES = 4
"""For samples, as most micro-batches have."""


def fastest_backend(
    setup: AttentionSetup,
    group: torch.distributed.ProcessGroup,
    check: Callable[[AttentionSetup], None],
) -> str:
    """Name of the candidate that takes least for a forward and a backward pass.

    Every rank of the group must call it and gets the same answer: a time is the slowest rank's. A
    candidate that does not work on every machine, or for which `check` raises, is passed over.

    Raises:
        GLMError: none works, with the reasons, on every rank; one left the GPU unusable.
    """
    left_out = WITHOUT_DROPOUT if setup.dropout_probability > 0.0 else ()
    candidates = [name for name in CANDIDATES if name not in left_out]
    milliseconds = dict.fromkeys(candidates, math.inf)
    reasons = dict.fromkeys(candidates, "does not work on another rank")
    for name in candidates:
        try:
            check(setup._replace(backend=name))
            milliseconds[name] = _milliseconds(name, setup)
        # Whatever stops a kernel, another one may do.
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _check_context(name)
    slowest = torch.tensor([*milliseconds.values()], device=setup.device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX, group)
    milliseconds = dict(zip(candidates, slowest.tolist(), strict=True))
    best = min(milliseconds, key=milliseconds.get)
    found = "; ".join(
        f"{name} {reasons[name] if time == math.inf else f'{time:.2f} ms'}"
        for name, time in milliseconds.items()
    )
    if milliseconds[best] == math.inf:
        raise GLMError(f"--glm-attention-backend auto: none works here: {found}")
    log_single_rank(
        logger, logging.INFO,
        f"attention, forward and backward, of {setup.batch} x {setup.seq_length} tokens: {found}. "
        f"Training with {best}",
    )  # fmt: skip
    return best


def _check_context(name: str) -> None:
    """Whether the GPU answers after an error of a candidate."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise GLMError(
            f"--glm-attention-backend auto: {name} has left the GPU unusable to this process "
            f"({str(error).partition(chr(10))[0]}); name another backend of "
            f"{', '.join(CANDIDATES)}, and report it"
        ) from error


def _milliseconds(name: str, setup: AttentionSetup) -> float:
    """Median time of both passes."""
    attend, generator = load_backend(name), torch.Generator(setup.device).manual_seed(0)
    shape = (setup.seq_length, setup.batch, setup.heads, setup.dim)
    mixed = torch.randn(*shape[:3], 3 * setup.dim, generator=generator, device=setup.device)
    mixed = mixed.to(setup.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator, device=setup.device).to(setup.dtype).flatten(2)
    context = torch.zeros(setup.batch, min(PLACES, setup.max_samples), device=setup.device)
    context[:, 0] = int(CONTEXT_SHARE * setup.seq_length)
    samples = make_samples(context, torch.full_like(context, setup.seq_length))
    dropout = fixed_dropout(setup.dropout_probability, setup.device)

    def passes() -> None:
        parts = mixed.split(setup.dim, dim=-1)
        attend(*parts, samples, softmax_scale=setup.softmax_scale, dropout=dropout).backward(grad)

    return do_bench(passes, grad_to_none=[mixed], return_mode="median")
