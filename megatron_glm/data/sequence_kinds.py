"""The kinds of sequences that an epoch of text is cut into, with fixed numbers of raw tokens each.

A corrupted sequence is longer than its text: by one token for every [gMASK] sample, by two for
every span of a [MASK] or [sMASK] sample. A kind fixes both numbers so that text and overhead fill
the sequence exactly. Where a sequence begins in the text is then a product, not a running sum,
and no target needs to be cut.
"""

from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

import numpy as np

from megatron_glm.data.blank_infilling import Objective
from megatron_glm.data.config import GLMDatasetConfig
from megatron_glm.data.span_sampling import expected_spans

LEAST_SHORT_LENGTH = 32
# More than three [sMASK] spans in 512 tokens would leave more than 1% of padding where long
# sentences take fewer.
_TOKENS_PER_SENTENCE_SPAN = 160


class SequenceKind(NamedTuple):
    """How a sequence is made."""

    objective: Objective
    share: Fraction  # of the sequences
    num_tokens: int  # raw tokens of text in it
    num_blanks: int  # most blanks that fit beside them
    num_samples: int  # samples, where it is not cut short
    short_prob: float  # probability of more and shorter samples


def sequence_kinds(config: GLMDatasetConfig, mean_document_length: float) -> list[SequenceKind]:
    """The kinds that the config gives a share to; shares sum to 1.

    mean_document_length: in tokens; matters only where documents are kept apart, for then a
    sequence has about seq_length / mean_document_length samples more.
    """
    length, group = config.sequence_length, config.aggregated_samples_per_sequence
    gmask, smask, short, single = (
        Fraction(str(value))
        for value in (config.gpt_prob, config.sentence_mask_prob, config.short_seq_prob,
                      config.single_span_prob)
    )
    most = min(config.max_samples_per_sequence - 1, max(1, length // LEAST_SHORT_LENGTH))
    parts = 1
    if config.reset_attention_mask:
        expected = length / max(mean_document_length, 1)
        parts = min(1 + ceil(expected + 2 * expected**0.5), config.max_samples_per_sequence - 1)

    def kind(objective: Objective, share: Fraction, blanks: int, samples: int,
             short_prob: float = 0.0) -> SequenceKind:
        overhead = blanks if objective == Objective.GMASK else 2 * blanks
        return SequenceKind(objective, share, length - overhead, blanks, samples, short_prob)

    spans = group * expected_spans(length / group, config.mask_prob, config.average_block_length)
    fewer = max(floor(spans), group)
    more_share = Fraction(spans).limit_denominator(10**6) - fewer if spans > fewer else Fraction(0)
    mask = max(1 - gmask - smask, Fraction(0))
    sentence_spans = max(length // _TOKENS_PER_SENTENCE_SPAN, group)
    kinds = [
        kind(Objective.GMASK, gmask * (1 - short), parts, 1),
        kind(Objective.GMASK, gmask * short, max(most, parts), 1, 1.0),
        kind(Objective.MASK, mask * (1 - single) * (1 - more_share), fewer, group, float(short)),
        kind(Objective.MASK, mask * (1 - single) * more_share, fewer + 1, group, float(short)),
        kind(Objective.MASK, mask * single, group, group),
        kind(Objective.SMASK, smask, sentence_spans, group),
    ]
    return [item for item in kinds if item.share > 0]


class Epoch(NamedTuple):
    """How many sequences of each kind an epoch of text has, and what is left over.

    Sequences are numbered kind by kind; the last ones, of the first kind, take what is left.
    """

    kinds: list[SequenceKind]
    counts: list[int]
    num_tokens: int
    num_sequences: int

    @classmethod
    def of(cls, kinds: list[SequenceKind], num_tokens: int) -> "Epoch":
        mean = sum(kind.share * kind.num_tokens for kind in kinds)
        total = floor(num_tokens / mean)
        while True:
            counts = _apportion(total, [kind.share for kind in kinds])
            left = num_tokens - _tokens_of(counts, kinds)
            if left >= 0:
                break
            total -= 1
        rest = -(-left // kinds[0].num_tokens)
        return cls(kinds, counts, num_tokens, sum(counts) + rest)

    def locate(self, index: int) -> tuple[SequenceKind, int, int]:
        """Kind, first raw token and number of raw tokens of sequence `index` of the epoch."""
        begin = 0
        for kind, count in zip(self.kinds, self.counts, strict=True):
            if index < count:
                return kind, begin + index * kind.num_tokens, kind.num_tokens
            index -= count
            begin += count * kind.num_tokens
        kind = self.kinds[0]
        begin += index * kind.num_tokens
        return kind, begin, min(kind.num_tokens, self.num_tokens - begin)


def _tokens_of(counts: list[int], kinds: list[SequenceKind]) -> int:
    return sum(count * kind.num_tokens for count, kind in zip(counts, kinds, strict=True))


def _apportion(total: int, shares: list[Fraction]) -> list[int]:
    """Whole numbers in proportion to shares that sum to total, by largest remainder."""
    counts = [floor(total * share) for share in shares]
    by_remainder = np.argsort([float(count - total * share) for count, share
                               in zip(counts, shares, strict=True)], kind="stable")
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts
