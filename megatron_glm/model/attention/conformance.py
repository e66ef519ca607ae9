"""Does the attention that runs obey GLM's mask? Perturb a token and see which outputs change.

A wrong mask trains without an error and with a plausible loss, so this runs before training on
the real backend, layout and dtype. A token of the context must change every output of its
sample, a later token its own output and those after it in its sample, and nothing else may
change by a bit. What a token reaches through many layers is what it reaches through one, so the
same rules hold for one attention and for a whole model.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from megatron_glm.errors import GLMError
from megatron_glm.model.attention.backends import select_backend
from megatron_glm.model.attention.bounds import SampleRange, make_samples, sample_ranges
from megatron_glm.model.dropout import fixed_dropout

MIN_SEQ_LENGTH = 16
"""Shortest sequence whose pack has a context, targets and a neighbour of each."""


class AttentionSetup(NamedTuple):
    """How one rank of a run calls its attention: what a kernel may be compiled for."""

    backend: str
    """As `--glm-attention-backend` names it."""
    batch: int
    seq_length: int
    heads: int
    """Of this rank."""
    dim: int
    max_samples: int
    """k, places in `samples`."""
    softmax_scale: float
    dropout_probability: float
    dtype: torch.dtype
    """Of query, key and value."""
    device: torch.device


class MaskConformanceError(GLMError):
    """The attention that would train the model does not obey GLM's mask."""


def check_attention(
    attention: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    setup: AttentionSetup,
    group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Check attention(query, key, value, samples) on inputs laid out as Megatron lays them out.

    Args:
        attention: takes [s, b, n, d] three times and int32 [b, 2, k], returns [s, b, n * d].
        setup: shapes and type of these, and for the error the name of the backend.
        group: ranks that must agree; all raise if one fails. None checks this rank alone.

    Raises:
        MaskConformanceError: names the backend, the rule, the positions and the rank.
    """
    generator = torch.Generator(setup.device).manual_seed(0)
    shape = (2, setup.seq_length, setup.batch, setup.heads, 3 * setup.dim)
    # Query, key and value are slices of one projection, as in Megatron. What replaces a token
    # has large values, so that a leak of a small probability survives the rounding of `dtype`.
    original, other = torch.randn(shape, generator=generator, device=setup.device)
    other[..., 2 * setup.dim :] *= 32
    original, other = original.to(setup.dtype), other.to(setup.dtype)

    def respond(samples: Tensor, perturbed: Tensor) -> Tensor:
        mixed = torch.where(perturbed.t().contiguous()[..., None, None], other, original)
        # With gradients, since a compiler makes another kernel where none are asked for.
        with torch.enable_grad():
            out = attention(*mixed.requires_grad_().split(setup.dim, dim=-1), samples)
        return out.detach().transpose(0, 1)

    _check(
        respond, f"attention backend {setup.backend}", setup.batch, setup.seq_length,
        setup.max_samples, setup.device, group, every_row=True,
    )


def check_backend(
    setup: AttentionSetup, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """`check_attention` of the backend that a run uses.

    With dropout the same kernels run at a rate of 2 ** -24, so that they drop next to nothing.
    """
    attend = select_backend(setup.backend, setup.device.type)
    dropout = fixed_dropout(2.0**-24 if setup.dropout_probability else 0.0, setup.device)

    def attention(query, key, value, samples):
        return attend(
            query, key, value, samples, softmax_scale=setup.softmax_scale, dropout=dropout
        )

    check_attention(attention, setup, group)


def check_model(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    name: str,
    batch: int,
    seq_length: int,
    vocab_size: int,
    max_samples: int,
    device: torch.device,
    group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Check a whole model, dropout off: forward(tokens, position_ids, samples) -> logits.

    One token moves distant logits by less than half precision resolves, so some output of each
    part that must change has to change here, where `check_attention` wants every output.

    Args:
        forward: takes int64 [b, s] twice and int32 [b, 2, k]; returns [b, s, any], of this rank.
        name: of the model or its backend, for the error.
        vocab_size: token ids are drawn below it.
        batch, seq_length, max_samples, device: b, s, k and where the model lies.
        group: as in `check_attention`.

    Raises:
        MaskConformanceError: names the model, the rule, the positions and the rank.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (batch, seq_length), generator=generator)
    shift = torch.randint(1, vocab_size, (batch, seq_length), generator=generator)
    position_ids = torch.arange(seq_length).expand(batch, -1).contiguous().to(device)
    tokens, other = tokens.to(device), ((tokens + shift) % vocab_size).to(device)

    def respond(samples: Tensor, perturbed: Tensor) -> Tensor:
        return forward(torch.where(perturbed, other, tokens), position_ids, samples)

    _check(respond, name, batch, seq_length, max_samples, device, group, every_row=False)


def probe_samples(batch: int, seq_length: int, max_samples: int, turn: int = 0) -> Tensor:
    """Packs to probe, int32 [b, 2, k]: one sample and four unequal ones, in turn.

    Boundaries fall inside the blocks of any kernel. The last sample of four is padding, the
    second has no context.
    """
    shares = ((0.37, 0.6), (0.71, 0.0), (0.93, 0.45), (1.0, 0.0))
    ends = [int(share * seq_length) for share, _ in shares]
    starts = [0, *ends]
    contexts = [
        int(share * (end - start))
        for (_, share), start, end in zip(shares, starts, ends, strict=False)
    ]
    if max_samples < len(ends):
        ends, contexts = [*ends[: max_samples - 1], seq_length], contexts[:max_samples]
    unused = max_samples - len(ends)
    packed = (contexts + [0] * unused, ends + [seq_length] * unused)
    single = (
        [seq_length // 2 + 1] + [0] * (max_samples - 1),
        [seq_length] * max_samples,
    )
    layouts = [(packed, single)[(row + turn) % 2] for row in range(batch)]
    return make_samples(*(torch.tensor(part) for part in zip(*layouts, strict=True)))


@torch.no_grad()
def _check(respond, name, batch, seq_length, max_samples, device, group, every_row):
    if seq_length < MIN_SEQ_LENGTH:
        raise GLMError(
            f"--seq-length {seq_length}: the mask is checked on {MIN_SEQ_LENGTH} tokens or more; "
            "lengthen it, or pass --no-mask-conformance-check"
        )
    # The forward may hold collectives, so every rank runs every probe before any of them raises.
    violations = []
    for turn in range(2 if batch == 1 else 1):
        samples = probe_samples(batch, seq_length, max_samples, turn)
        violations += _violations(respond, samples, seq_length, device, every_row)
    violations = _agree(violations, group)
    if violations:
        more = f"; {len(violations) - 1} more violations" if len(violations) > 1 else ""
        raise MaskConformanceError(
            f"{name} breaks GLM's mask: {violations[0]}{more}. Train with another "
            "--glm-attention-backend, and report this one"
        )


def _agree(violations, group):
    """The violations of every rank of `group`, each with its rank; the same list on all ranks."""
    if group is None:
        return violations
    gathered = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, violations, group=group)
    return [f"rank {rank}: {text}" for rank, texts in enumerate(gathered) for text in texts]


def _violations(respond, samples, seq_length, device, every_row) -> list[str]:
    on_device = samples.to(device)
    perturbed = torch.zeros(samples.shape[0], seq_length, dtype=torch.bool, device=device)
    base = respond(on_device, perturbed).float()
    if not base.isfinite().all():
        return ["outputs must be finite, and these are not"]
    # Zero wherever the forward is deterministic; elsewhere a change must stand out from it.
    noise = 4 * (respond(on_device, perturbed).float() - base).abs().max()

    def changed_rows():
        return ((respond(on_device, perturbed).float() - base).abs() > noise).any(dim=-1).cpu()

    perturbed[0] = True
    leak = changed_rows()[1:].any(dim=0)
    found = []
    if leak.any():
        found.append("another sequence of the batch must not see sequence 0, but "
                     f"{_positions(leak)} did")
    # Each sequence is its own experiment, so one forward probes a token of each.
    probes = [list(_probes(ranges)) for ranges in sample_ranges(samples)]
    for index in range(max(map(len, probes))):
        chosen = [sequence[index % len(sequence)] for sequence in probes]
        perturbed.zero_()
        for row, (_, token) in enumerate(chosen):
            perturbed[row, token] = True
        for changed, (sample, token) in zip(changed_rows(), chosen, strict=True):
            found += _judge(changed, sample, token, every_row)
    return found


def _probes(ranges: list[SampleRange]) -> Iterator[tuple[SampleRange, int]]:
    """The tokens at which a wrong mask shows: both sides of every boundary and one between."""
    for sample in ranges:
        start, context_end, end = sample
        tokens = {start, context_end - 1, context_end, (context_end + end) // 2, end - 1}
        for token in sorted(tokens):
            if start <= token < end:
                yield sample, token


def _judge(changed: Tensor, sample: SampleRange, token: int, every_row: bool) -> list[str]:
    """Compare the rows of a sequence that changed, bool [s], with those that may and must."""
    start, context_end, end = sample
    row = torch.arange(changed.shape[0])
    in_context = (row >= start) & (row < context_end)
    in_targets = (row >= context_end) & (row < end)
    must_not = {"another sample of the pack must not see": (row < start) | (row >= end)}
    if token < context_end:
        part = "context"
        must = {
            "the earlier context must see": in_context & (row < token),
            "this context token and those after it must see": in_context & (row >= token),
            "the targets must see": in_targets,
        }
    else:
        part = "target"
        must_not["the context must not see"] = in_context
        must_not["an earlier target must not see"] = in_targets & (row < token)
        must = {"this target and those after it must see": in_targets & (row >= token)}

    where = f"token {token}, {part} of the sample [{start}, {end}) with context end {context_end}"
    found = []
    for rule, rows in must_not.items():
        seeing = rows & changed
        if seeing.any():
            found.append(f"{rule} {where}, but {_positions(seeing)} did")
    for rule, rows in must.items():
        blind = rows & ~changed
        if blind.any() if every_row else rows.any() and not (rows & changed).any():
            found.append(f"{rule} {where}, but {_positions(blind)} did not")
    return found


def _positions(rows: Tensor) -> str:
    indices = rows.nonzero().flatten().tolist()
    if len(indices) == 1:
        return f"row {indices[0]}"
    return f"rows {indices[0]} to {indices[-1]} ({len(indices)} in all)"
