"""An epoch as so many sequences of each kind: exact arithmetic, every token in exactly one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_glm.data.blank_infilling import Objective
from megatron_glm.data.config import CUTTING_FLAGS
from megatron_glm.data.sequence_kinds import Epoch, sequence_kinds
from tests.data.corpora import make_config

SHARES = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.7, 1.0])


@st.composite
def kinds(draw):
    gpt_prob = draw(SHARES)
    config = make_config(
        "x", sequence_length=draw(st.sampled_from([64, 100, 512, 2048, 8192])), gpt_prob=gpt_prob,
        sentence_mask_prob=min(draw(SHARES), round(1 - gpt_prob, 2)), short_seq_prob=draw(SHARES),
        single_span_prob=draw(SHARES), reset_attention_mask=draw(st.booleans()),
    )
    return sequence_kinds(config, draw(st.sampled_from([1.0, 30.0, 500.0, 1e6])))


@given(kinds(), st.integers(0, 10**6))
def test_sequences_follow_one_another_without_gap_to_the_last_token(kinds, num_tokens):
    epoch = Epoch.of(kinds, num_tokens)
    step = max(1, epoch.num_sequences // 300)
    for index in range(0, epoch.num_sequences - 1, step):
        kind, begin, count = epoch.locate(index)
        assert 0 < count <= kind.num_tokens
        assert epoch.locate(index + 1)[1] == begin + count
    if epoch.num_sequences:
        _, begin, count = epoch.locate(epoch.num_sequences - 1)
        assert begin + count == num_tokens
        assert epoch.locate(0)[1] == 0
    else:
        assert num_tokens == 0


@given(kinds(), st.integers(10**15, 10**16))
def test_shares_are_exact_however_large_the_corpus(kinds, num_tokens):
    epoch = Epoch.of(kinds, num_tokens)
    assert sum(kind.share for kind in kinds) == 1
    for kind, count in zip(kinds, epoch.counts, strict=True):
        assert abs(count - kind.share * sum(epoch.counts)) <= 1
    _, begin, count = epoch.locate(epoch.num_sequences - 1)
    assert begin + count == num_tokens


def test_kinds_of_the_papers_settings():
    """A [gMASK] sequence holds 2047 tokens of text, a [MASK] one 4 samples with 22 or 23 spans."""
    found = sequence_kinds(make_config("x"), 500.0)
    by_objective = {}
    for kind in found:
        by_objective.setdefault(kind.objective, []).append(kind)
    assert by_objective.keys() == {Objective.GMASK, Objective.MASK}
    whole, short = by_objective[Objective.GMASK]
    assert (whole.num_tokens, whole.share) == (2047, Fraction("0.686"))
    assert (short.num_tokens, short.share) == (2048 - 63, Fraction("0.014"))
    fewer, more, single = by_objective[Objective.MASK]
    assert (fewer.num_tokens, fewer.num_blanks) == (2048 - 180, 90)
    assert (more.num_tokens, more.num_blanks) == (2048 - 182, 91)
    assert (single.num_tokens, single.num_blanks, single.share) == (2040, 4, Fraction("0.006"))
    mean = (fewer.share * 90 + more.share * 91) / (fewer.share + more.share)
    assert float(mean) == pytest.approx(90.594, abs=0.001)


@pytest.mark.parametrize("reset_attention_mask", [False, True])
def test_what_shapes_the_kinds_is_compared_at_a_resume(reset_attention_mask):
    config, read = make_config("x", reset_attention_mask=reset_attention_mask), set()

    class Recorder:
        def __getattr__(self, name):
            read.add(name)
            return getattr(config, name)

    assert sequence_kinds(Recorder(), 500.0) == sequence_kinds(config, 500.0)
    # --split decides which text is cut.
    assert {*CUTTING_FLAGS} == read - {"sequence_length"} | {"seq_length", "split"}
