"""Which backend trains fastest on this GPU at the shape of the run? Timed before training."""

import logging
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

    Every rank of the group must call it and gets the answer of the first. A candidate that does not
    work on this machine, or for which `check` raises, is passed over.

    Raises:
        GLMError: none works here, with the reasons; one left the GPU unusable.
    """
    milliseconds: dict[str, float] = {}
    reasons: dict[str, str] = {}
    left_out = WITHOUT_DROPOUT if setup.dropout_probability > 0.0 else ()
    candidates = [name for name in CANDIDATES if name not in left_out]
    for name in candidates:
        try:
            check(setup._replace(backend=name))
            milliseconds[name] = _milliseconds(name, setup)
        # Whatever stops a kernel, another one may do.
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            _check_context(name)
    if not milliseconds:
        raise GLMError(
            "--glm-attention-backend auto: none works here: "
            f"{'; '.join(f'{name} {reason}' for name, reason in reasons.items())}"
        )
    best = min(milliseconds, key=milliseconds.get)
    choice = torch.tensor([candidates.index(best)], device=setup.device)
    torch.distributed.broadcast(choice, group=group, group_src=0)
    best = candidates[choice.item()]
    found = {name: f"{time:.2f} ms" for name, time in milliseconds.items()} | reasons
    log_single_rank(
        logger, logging.INFO,
        f"attention, forward and backward, of {setup.batch} x {setup.seq_length} tokens: "
        f"{'; '.join(f'{name} {found[name]}' for name in candidates)}. Training with {best}",
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
