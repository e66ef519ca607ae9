"""Which source a sequence is from: no sequence of any source lost or repeated, whatever changes."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.mix import Mix, split_stream, stream_counts, to_shares
from megatron_glm.errors import GLMError

SHARES = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


def read(mix, start, stop):
    """Sequences of each source in the order read: source -> indices."""
    result = {}
    for index in range(start, stop):
        source, place = mix.locate(index)
        result.setdefault(source, []).append(place)
    return result


@given(SHARES, st.integers(0, 400))
def test_a_split_gives_each_stream_its_share_in_order(shares, size):
    places = [split_stream(index, shares) for index in range(size)]
    counts = stream_counts(size, shares)
    for stream, share in enumerate(shares):
        mine = [place for number, place in places if number == stream]
        assert mine == list(range(counts[stream]))
        # Each further split adds less than one to how far a count can be from its share.
        assert abs(counts[stream] - size * share / sum(shares)) < len(shares)


def test_a_full_round_has_exactly_the_shares():
    assert stream_counts(60, [10, 20, 30]) == [10, 20, 30]
    assert to_shares(["0.3", 0.7]) == [3, 7] and to_shares([1, 2.5]) == [2, 5]


def test_an_index_of_a_year_is_found_at_once():
    mix = Mix.of({"a": 3, "b": 7}, {"t": 1}, Fraction(1, 20))
    source, place = mix.locate(10**15)
    assert place == mix.counts(10**15)[source]


@given(st.fractions(0, 1), st.integers(0, 300), st.integers(0, 600))
def test_the_share_ramps_linearly(share, ramp, size):
    mix = Mix.of({"text": 1}, {"task": 1}, share, ramp)
    ramped = min(size, ramp)
    area = float(share) * (ramped**2 / (2 * ramp) if ramp else 0) + float(share) * (size - ramped)
    assert mix.counts(size)["task"] == pytest.approx(area, abs=1.001)
    assert read(mix, 0, size).get("task", []) == list(range(mix.counts(size)["task"]))


@st.composite
def plans(draw):
    """A mix over some of five sources."""
    names = draw(st.sets(st.sampled_from("abc"), min_size=1))
    tasks = draw(st.sets(st.sampled_from("tu")))
    weights = st.integers(1, 9)
    return Mix.of(
        {name: draw(weights) for name in sorted(names)},
        {name: draw(weights) for name in sorted(tasks)},
        draw(st.fractions(0, 1)), draw(st.integers(0, 60)),
    )


@given(st.lists(st.tuples(plans(), st.integers(0, 90)), min_size=1, max_size=5), st.data())
def test_changing_the_mix_neither_loses_nor_repeats(runs, data):
    """Runs follow one another with other weights, sources and ramps, each from a checkpoint."""
    seen, state, consumed = {}, None, 0
    for plan, length in runs:
        mix = plan.continued(state, consumed) if state is not None else plan
        # A run may be stopped and started without a change at any place.
        pause = consumed + data.draw(st.integers(0, length))
        again = plan.continued(json.loads(json.dumps(mix.state_dict())), pause)
        for part, start, stop in ((mix, consumed, pause), (again, pause, consumed + length)):
            for source, places in read(part, start, stop).items():
                seen.setdefault(source, []).extend(places)
        state, consumed = json.loads(json.dumps(again.state_dict())), consumed + length
        assert again.counts(consumed) == {
            source: len(seen.get(source, [])) for source in again.counts(consumed)
        }
    for places in seen.values():
        assert places == list(range(len(places)))


def test_a_resumed_run_reads_what_an_uninterrupted_one_would():
    plan = Mix.of({"a": 1, "b": 2}, {"t": 1}, Fraction(1, 10), 100)
    resumed = plan.continued(plan.state_dict(), 57)
    assert [plan.locate(i) for i in range(57, 400)] == [resumed.locate(i) for i in range(57, 400)]


def test_what_has_changed_since_a_checkpoint_is_told():
    plan = Mix.of({"a": 1, "b": 2}, {"t": 1}, Fraction(1, 10))
    state = plan.state_dict()
    assert plan.change_in_words(state) == ""
    other = Mix.of({"a": 1, "c": 2}, {"u": 1}, Fraction(1, 10))
    assert other.change_in_words(state) == "new: c, u; no longer read: b, t"
    heavier = Mix.of({"a": 1, "b": 3}, {"t": 1}, Fraction(1, 10))
    assert heavier.change_in_words(state) == "other shares of the same sources"


def test_a_state_of_a_later_time_is_refused():
    plan = Mix.of({"a": 1}, {}, Fraction(0))
    later = Mix.of({"a": 1, "b": 1}, {}, Fraction(0)).continued(plan.state_dict(), 100)
    with pytest.raises(GLMError, match="begins at sequence 100, but the run is at 50"):
        plan.continued(later.state_dict(), 50)
    with pytest.raises(GLMError, match="sequence 99 was read under an earlier mix"):
        later.locate(99)


def test_a_changed_share_ramps_from_where_it_was():
    old = Mix.of({"a": 1}, {"t": 1}, Fraction(1, 10))
    new = Mix.of({"a": 1}, {"t": 1}, Fraction(1, 2), 1000).continued(old.state_dict(), 5000)
    counts = [new.counts(5000 + n)["t"] - old.counts(5000)["t"] for n in (0, 100, 500, 1000, 1100)]
    np.testing.assert_allclose(counts, [0, 12, 100, 300, 350], atol=1)
