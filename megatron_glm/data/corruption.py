"""Raw text of a sequence into its samples, by the kind of the sequence."""

from math import ceil
from typing import Any, NamedTuple

import numpy as np

from megatron_glm.data.blank_infilling import (
    Objective,
    Sample,
    SpecialTokens,
    blank_sample,
    gmask_sample,
)
from megatron_glm.data.config import GLMDatasetConfig
from megatron_glm.data.packing import share_out, split_evenly
from megatron_glm.data.sequence_kinds import LEAST_SHORT_LENGTH, SequenceKind
from megatron_glm.data.span_sampling import place_spans, sample_sentences, sample_span_lengths

SENTENCE_ENDS = (".", "?", "!", ";", ":", "。", "？", "！", "；", "：", "…", "\n")


class Part(NamedTuple):
    """The text of one sample, and how many blanks it may have."""

    places: np.ndarray  # [n] int64, indices into the text of the sequence
    num_blanks: int


class Corruption:
    """Cuts the text of a sequence into parts and makes a sample of each.

    Every token of the text comes out exactly once, in a context or as a target.
    """

    def __init__(self, config: GLMDatasetConfig) -> None:
        self.config = config
        self.special = SpecialTokens.of(config.tokenizer)
        self.ends_sentence = (
            sentence_end_table(config.tokenizer) if config.sentence_mask_prob > 0 else None
        )

    def __call__(
        self,
        rng: np.random.RandomState,
        kind: SequenceKind,
        ids: np.ndarray,
        document_starts: np.ndarray,
    ) -> list[tuple[Part, Sample]]:
        """Samples of a sequence, which fit in its length.

        ids: [n] int64, n <= kind.num_tokens. document_starts: [m] int64, ascending, where a
        document begins in ids; used only where documents are kept apart.
        """
        parts = self._cut(rng, kind, len(ids))
        if self.config.reset_attention_mask:
            parts = self._cut_at_documents(parts, kind, document_starts)
        return [(part, self._corrupt(rng, kind, ids[part.places], part)) for part in parts]

    def _cut(self, rng: np.random.RandomState, kind: SequenceKind, num_tokens: int) -> list[Part]:
        num_samples, blanks = kind.num_samples, kind.num_blanks
        if rng.random_sample() < kind.short_prob:
            longest = self.config.sequence_length // num_samples
            least = min(LEAST_SHORT_LENGTH, longest)
            num_samples = self.config.sequence_length // rng.randint(least, longest + 1)
            num_samples = min(num_samples, blanks, self.config.max_samples_per_sequence - 1)
        if num_tokens < kind.num_tokens:
            num_samples = ceil(num_samples * num_tokens / kind.num_tokens)
        if kind.objective == Objective.GMASK:
            sizes, dealt = split_evenly(num_tokens, num_samples), [1] * num_samples
        else:
            if num_tokens < kind.num_tokens:
                blanks = max(blanks * num_tokens // kind.num_tokens, num_samples)
            dealt = split_evenly(blanks, num_samples)
            # Equal lengths once corrupted, so that samples begin where blocks of attention do.
            sizes = split_evenly(num_tokens + 2 * blanks, num_samples) - 2 * dealt
        edges = np.cumsum(sizes)[:-1]
        places = np.split(np.arange(num_tokens), edges)
        return [Part(*part) for part in zip(places, map(int, dealt), strict=True)]

    def _cut_at_documents(
        self, parts: list[Part], kind: SequenceKind, document_starts: np.ndarray
    ) -> list[Part]:
        """Cuts parts where a document begins, and deals the blanks to the pieces anew.

        Pieces beyond the rows of a sequence, the shortest ones, go behind the others as one sample
        without targets: nothing is learned from what they see of each other.
        """
        blanks = sum(part.num_blanks for part in parts)
        pieces = []
        for part in parts:
            first, last = part.places[0], part.places[-1]
            inside = document_starts[(document_starts > first) & (document_starts <= last)]
            pieces += np.split(part.places, inside - first)
        most = self.config.max_samples_per_sequence - 1
        surplus: list[np.ndarray] = []
        if len(pieces) > most:
            by_length = sorted(range(len(pieces)), key=lambda index: -len(pieces[index]))
            kept = set(by_length[: most - 1])
            surplus = [piece for index, piece in enumerate(pieces) if index not in kept]
            pieces = [pieces[index] for index in sorted(kept)]
        sizes = np.array([len(piece) for piece in pieces])
        if kind.objective == Objective.GMASK:
            dealt = np.zeros(len(pieces), dtype=np.int64)
            dealt[np.argsort(-sizes, kind="stable")[: kind.num_blanks]] = 1
        else:
            # A third at most: then every piece has room for its spans with a token between them.
            dealt = share_out(min(blanks, int(sizes.sum()) // 3), sizes)
        result = [Part(*part) for part in zip(pieces, map(int, dealt), strict=True)]
        return result + ([Part(np.concatenate(surplus), 0)] if surplus else [])

    def _corrupt(
        self, rng: np.random.RandomState, kind: SequenceKind, ids: np.ndarray, part: Part
    ) -> Sample:
        if part.num_blanks == 0:
            return blank_sample(ids, _NO_SPANS, kind.objective, self.special)
        if kind.objective == Objective.MASK:
            spans = self._spans(rng, ids, part.num_blanks)
            return blank_sample(ids, spans, kind.objective, self.special)
        if kind.objective == Objective.SMASK:
            spans = self._sentences(rng, ids, part.num_blanks)
            if len(spans):
                return blank_sample(ids, spans, kind.objective, self.special)
        least = max(1, ceil(self.config.min_gmask_ratio * len(ids)))
        return gmask_sample(ids, rng.randint(least, len(ids) + 1), self.special)

    def _spans(self, rng: np.random.RandomState, ids: np.ndarray, num_spans: int) -> np.ndarray:
        lengths = sample_span_lengths(rng, num_spans, len(ids), self.config.average_block_length)
        ends = np.flatnonzero(ids == self.special.eod)
        return rng.permutation(place_spans(rng, lengths, len(ids), ends))

    def _sentences(self, rng: np.random.RandomState, ids: np.ndarray, most: int) -> np.ndarray:
        return sample_sentences(
            rng,
            np.flatnonzero(self.ends_sentence[ids]),
            np.flatnonzero(ids == self.special.eod),
            self.config.mask_prob * len(ids),
            most,
        )


_NO_SPANS = np.zeros((0, 2), dtype=np.int64)


def sentence_end_table(tokenizer: Any) -> np.ndarray:
    """Which ids end a sentence: [vocab_size] bool, read off their text."""
    table = np.array(
        [
            tokenizer.detokenize([index]).rstrip(" ").endswith(SENTENCE_ENDS)
            for index in range(tokenizer.vocab_size)
        ]
    )
    table[list(SpecialTokens.of(tokenizer))] = False
    return table
