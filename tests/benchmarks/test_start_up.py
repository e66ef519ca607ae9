"""The start-up benchmark times every phase of a start, and no step takes long to come."""

from benchmarks import start_up
from tests.training.corpus import make_corpus


def test_phases_follow_each_other():
    clock = start_up.Clock(start=0.0)
    clock.mark("first")
    second = clock.after(lambda: "result", "second")
    assert second() == second() == "result"
    assert list(clock.phases) == ["first", "second"]
    assert all(seconds >= processor_s >= 0 for seconds, processor_s in clock.phases.values())


def test_a_run_comes_to_its_first_step_in_time(tmp_path):
    corpus = make_corpus(tmp_path / "corpus", num_documents=60)
    phases = start_up.timed([*start_up.FLAGS, *corpus.flags], tmp_path)
    assert len(phases) == 4 + len(start_up.MARKS)
    # Seconds on a machine that may be busy with other things, so not the limit itself.
    assert sum(processor_s for _, processor_s in phases.values()) < start_up.LIMIT_S
