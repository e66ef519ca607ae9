"""Which source each sequence of a run is from: closed form, so that no run needs an index of it.

A stream of sequences is split in two by a share, and the halves again, until each source has its
own. Of the first n, the first half gets floor(share * n): a count that grows by 0 or 1 with n, so
that every source is read in order, without a gap and without a repeat, whatever the shares are.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from math import lcm

from megatron_glm.errors import GLMError

# Shares of prompt/target data are whole multiples of one over this.
_UNIT = 1 << 32


def to_shares(weights: Sequence[float | int]) -> list[int]:
    """Whole numbers in exactly the proportions of the weights as they were typed."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(weight.denominator for weight in exact))
    return [int(weight * unit) for weight in exact]


def split_stream(index: int, shares: Sequence[int]) -> tuple[int, int]:
    """Which of several streams the `index`-th sequence is from, and its index in that stream."""
    rest = sum(shares)
    for stream, share in enumerate(shares):
        before = index * share // rest
        if (index + 1) * share // rest > before:
            return stream, before
        index -= before
        rest -= share
    raise ValueError("all shares are 0")


def stream_counts(count: int, shares: Sequence[int]) -> list[int]:
    """How many of the first `count` sequences each stream has."""
    counts, rest = [], sum(shares)
    for share in shares:
        counts.append(count * share // rest if rest else 0)
        count -= counts[-1]
        rest -= share
    return counts


@dataclass(frozen=True)
class Mix:
    """The sources of a run from sequence `start` on.

    text, multitask: identity of a source -> its weight among its kind. ramp_from, ramp_to: share of
    multitask sequences, in units of 2**-32, that changes linearly over ramp_samples sequences.
    consumed: sequences of each source that were read before `start`.
    """

    text: dict[str, int]
    multitask: dict[str, int] = field(default_factory=dict)
    ramp_to: int = 0
    ramp_samples: int = 0
    ramp_from: int = 0
    start: int = 0
    consumed: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        text: dict[str, int],
        multitask: dict[str, int],
        multitask_share: Fraction,
        ramp_samples: int = 0,
    ) -> "Mix":
        """A mix from the first sequence of a run; its ramp begins at 0.

        multitask_share: of the sequences, between 0 and 1.
        """
        share = round(multitask_share * _UNIT) if multitask else 0
        return cls(
            dict(text), dict(multitask), share, ramp_samples, 0 if ramp_samples else share
        )

    def continued(self, state: dict, consumed_samples: int) -> "Mix":
        """This mix for a run that has read `consumed_samples` sequences under the mix of `state`.

        The same mix goes on where it was. Another one begins there: each source goes on behind the
        last sequence read of it, and the share of multitask data ramps from what it was. Raises
        GLMError where the state is of a later time.
        """
        old = Mix(**state)
        if consumed_samples < old.start:
            raise GLMError(
                f"the checkpoint's mix of data begins at sequence {old.start}, but the run is at "
                f"{consumed_samples}: both must be of the same checkpoint"
            )
        if self._plan() == old._plan():
            return old
        reached = old._share_at(consumed_samples)
        return replace(
            self,
            ramp_from=reached if self.ramp_samples and self.multitask else self.ramp_to,
            start=consumed_samples,
            consumed=old.consumed | old.counts(consumed_samples),
        )

    def change_in_words(self, state: dict) -> str:
        """What of this mix is not as in `state`, "" where all is."""
        old = Mix(**state)
        before, after = old.text | old.multitask, self.text | self.multitask
        changes = [
            f"{what} {', '.join(sorted(names))}"
            for what, names in (("new:", after.keys() - before.keys()),
                                ("no longer read:", before.keys() - after.keys()))
            if names
        ]  # fmt: skip
        if not changes and self._plan() != old._plan():
            changes.append("other shares of the same sources")
        return "; ".join(changes)

    def state_dict(self) -> dict:
        """What `continued` takes: plain numbers and names, fit for JSON."""
        return asdict(self)

    def locate(self, index: int) -> tuple[str, int]:
        """Source of sequence `index` of the run, and the sequence's index in that source.

        Raises GLMError for an index before `start`, which another mix decided.
        """
        offset = index - self.start
        if offset < 0:
            raise GLMError(
                f"sequence {index} was read under an earlier mix of data: this one begins at "
                f"{self.start}; ask a checkpoint from before that"
            )
        before = self._multitask_count(offset)
        if self._multitask_count(offset + 1) > before:
            group, offset = self.multitask, before
        else:
            group, offset = self.text, offset - before
        stream, offset = split_stream(offset, list(group.values()))
        source = list(group)[stream]
        return source, self.consumed.get(source, 0) + offset

    def counts(self, index: int) -> dict[str, int]:
        """Sequences of each source among the first `index` of the run."""
        offset = index - self.start
        num_multitask = self._multitask_count(offset)
        result = {}
        for group, count in ((self.text, offset - num_multitask), (self.multitask, num_multitask)):
            for source, read in zip(
                group, stream_counts(count, list(group.values())), strict=True
            ):
                result[source] = self.consumed.get(source, 0) + read
        return result

    def _plan(self) -> tuple:
        return self.text, self.multitask, self.ramp_to, self.ramp_samples

    def _multitask_count(self, offset: int) -> int:
        """Multitask sequences among the first `offset` of this mix: the integral of their share."""
        ramped = min(offset, self.ramp_samples)
        count = 2 * self.ramp_from * ramped
        total = self.ramp_to * (offset - ramped)
        if ramped:
            # The area of a trapezium; times 2 * ramp_samples to stay in whole numbers.
            area = count * self.ramp_samples + (self.ramp_to - self.ramp_from) * ramped**2
            return (area + 2 * self.ramp_samples * total) // (2 * self.ramp_samples * _UNIT)
        return total // _UNIT

    def _share_at(self, index: int) -> int:
        ramped = min(index - self.start, self.ramp_samples)
        if ramped == self.ramp_samples:
            return self.ramp_to
        return self.ramp_from + (self.ramp_to - self.ramp_from) * ramped // self.ramp_samples
