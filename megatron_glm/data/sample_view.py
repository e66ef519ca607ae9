"""A packed sequence as a person reads it: blanks in their place, ranges instead of masks."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES, Objective
from megatron_glm.data.builder import MixedDataset
from megatron_glm.data.glm_dataset import GLMDataset


@dataclass(frozen=True)
class Filling:
    """What is generated for one blank, its tokens at places [begin, end) of the sequence."""

    begin: int
    end: int
    first_position: int
    last_position: int
    text: str  # of the labels
    loss_weight: float  # summed over the labels


@dataclass(frozen=True)
class SampleView:
    """One sample of a pack, at places [begin, end) of the sequence."""

    begin: int
    end: int
    context_end: int  # tokens before it see each other
    objective: str
    context: str  # with the blanks numbered as they are filled
    fillings: list[Filling]
    documents: list[tuple[int, int, int]]  # index in the file, first token, one past the last


@dataclass(frozen=True)
class SequenceView:
    """A sequence, where it is from, and its samples."""

    index: int
    source: str
    epoch: int
    index_in_epoch: int
    length: int
    padding: int
    samples: list[SampleView]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def sample_rows(packed: dict[str, np.ndarray]) -> Iterator[tuple[int, int, int, Objective]]:
    """Begin, end, context length and objective of each sample of a sequence."""
    begin = 0
    rows = zip(packed["sample_ends"], packed["context_lengths"], packed["objectives"], strict=True)
    for end, context_length, objective in rows:
        if objective >= 0:
            yield begin, int(end), int(context_length), Objective(objective)
        begin = int(end)


def view_sequence(dataset: MixedDataset, index: int, tokenizer: Any) -> SequenceView:
    """Takes sequence `index` of a split apart. tokenizer: the one of the data."""
    identity, place = dataset.mix.locate(index)
    source = dataset.sources[identity]
    packed = source[place]
    epoch, index_in_epoch = divmod(place, source.num_sequences)
    documents = _documents(source, place)
    samples = [
        _view_sample(packed, row, owners, tokenizer)
        for row, owners in zip(sample_rows(packed), documents, strict=True)
    ]
    length = len(packed["tokens"])
    return SequenceView(
        index, source.dataset_path, epoch, index_in_epoch, length,
        length - max((sample.end for sample in samples), default=0), samples,
    )


def _documents(source: Any, place: int) -> list[list[tuple[int, int, int]]]:
    """Documents of each sample, with the range of their tokens that is in it."""
    if not isinstance(source, GLMDataset):
        return [
            [(document, 0, int(source.dataset.inputs.sequence_lengths[document]))]
            for document, _ in source.draw(place)
        ]
    _, passage, samples = source.draw(place)
    result = []
    for part, _ in samples:
        owners = np.searchsorted(passage.starts, part.places, side="right") - 1
        inside = part.places - passage.starts[owners] + passage.offsets[owners]
        result.append([
            (int(passage.documents[owner]), int(inside[owners == owner].min()),
             int(inside[owners == owner].max()) + 1)
            for owner in np.unique(owners)
        ])
    return result


def _view_sample(
    packed: dict[str, np.ndarray],
    row: tuple[int, int, int, Objective],
    documents: list[tuple[int, int, int]],
    tokenizer: Any,
) -> SampleView:
    begin, end, context_length, objective = row
    split = begin + context_length
    opens = (np.flatnonzero(packed["tokens"][split:end] == tokenizer.sop) + split).tolist()
    fillings = []
    for first, last in zip(opens, [*opens[1:], end][: len(opens)], strict=True):
        where = packed["position_ids"][first:last]
        fillings.append(Filling(
            first, last, int(where[0]), int(where[-1]),
            tokenizer.detokenize(packed["labels"][first:last].tolist()),
            float(packed["loss_mask"][first:last].sum()),
        ))
    return SampleView(
        begin, end, split, OBJECTIVE_NAMES[objective],
        _context_text(packed["tokens"][begin:split], fillings, objective, tokenizer),
        fillings, documents,
    )


def _context_text(
    context: np.ndarray,
    fillings: list[Filling],
    objective: Objective,
    tokenizer: Any,
) -> str:
    if objective in (Objective.GMASK, Objective.MULTITASK):
        numbers = {len(context) - 1: 1} if fillings else {}
    else:
        numbers = {filling.first_position: n for n, filling in enumerate(fillings, 1)}
    pieces, begin = [], 0
    for place in sorted(numbers):
        pieces.append(tokenizer.detokenize(context[begin:place].tolist()))
        pieces.append(f" ⟦{numbers[place]}⟧ ")
        begin = place + 1
    pieces.append(tokenizer.detokenize(context[begin:].tolist()))
    return "".join(pieces)


def render(view: SequenceView) -> str:
    """The view as text; ranges are written first-last, both included."""
    lines = [
        f"sequence {view.index}: sequence {view.index_in_epoch} in epoch {view.epoch} of "
        f"{view.source}, {len(view.samples)} samples in {view.length} tokens, "
        f"{view.padding} of padding"
    ]
    for number, sample in enumerate(view.samples):
        owners = ", ".join(f"{document} (tokens {first}-{last - 1})"
                           for document, first, last in sample.documents)
        context = _range(sample.begin, sample.context_end)
        lines += [
            "",
            f"sample {number}: {sample.objective}, tokens {_range(sample.begin, sample.end)}, "
            f"from document {owners}",
            f"  context, tokens {context}: each sees {context}; loss 0; "
            f"positions 0-{sample.context_end - sample.begin - 1}",
            _indent(sample.context),
        ]
        for blank, filling in enumerate(sample.fillings, 1):
            positions = (
                f"position {filling.first_position}"
                if filling.first_position == filling.last_position
                else f"positions {filling.first_position}-{filling.last_position}"
            )
            lines += [
                f"  blank ⟦{blank}⟧, tokens {_range(filling.begin, filling.end)}: each sees "
                f"{context} and {sample.context_end}-itself; loss {filling.loss_weight:g}; "
                f"{positions}; labels:",
                _indent(filling.text),
            ]
    return "\n".join(lines)


def _range(begin: int, end: int) -> str:
    return f"{begin}-{end - 1}" if end > begin else "none"


def _indent(text: str) -> str:
    return "\n".join(f"    | {line}" for line in text.split("\n"))
