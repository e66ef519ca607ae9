"""Requests join and leave a running batch; none is lost, and each gets what it gets alone."""

import threading

import pytest

from megatron_glm.data.tokenizer import build_tokenizer
from megatron_glm.errors import GLMError
from megatron_glm.inference.blanks import BlankCodec
from megatron_glm.inference.generation import Filler, run
from megatron_glm.inference.layout import Layout, process_group
from megatron_glm.inference.search import SearchConfig
from megatron_glm.inference.service import OverloadedError, Service, StoppedError, follow
from tests.inference.building import CPU, lively_source, make_engine, make_filler
from tests.ranks import run_ranks

TEXTS = ["the[MASK] sat", "the quick brown[gMASK]", "[MASK] cat[MASK] on the mat", "dog"]
CONFIGS = [
    SearchConfig(max_new_tokens=6),
    SearchConfig(max_new_tokens=17, num_beams=3),
    SearchConfig(max_new_tokens=9, temperature=1.0, seed=3),
]


class Waiter:
    """A listener that can be waited for."""

    def __init__(self):
        self.over = threading.Event()
        self.seen, self.search, self.error = [], None, None

    def progress(self, generated):
        self.seen.append(generated)

    def finished(self, search):
        self.search = search
        self.over.set()

    def failed(self, error):
        self.error = error
        self.over.set()

    def result(self):
        assert self.over.wait(30)
        if self.error:
            raise self.error
        return self.search.best.generated


@pytest.fixture(scope="module")
def filler(specials, tokenizer):
    return make_filler(lively_source(specials, 0.2), tokenizer)


@pytest.fixture
def service(filler):
    filler.engine.cache = filler.engine.new_cache()
    service = Service(filler, Layout(), max_rows=4, max_waiting=100)
    yield service
    if service._thread.is_alive():
        service.stop()


def alone(filler, text, config):
    search = filler.search(filler.codec.encode(text), config)
    filler.engine.cache = filler.engine.new_cache()
    list(run(filler.engine, [search], 1))
    return search.best.generated


def test_every_request_is_answered_as_if_it_were_alone(filler, service):
    requests = [(text, config) for text in TEXTS for config in CONFIGS] * 2
    expected = [alone(filler, *request) for request in requests]
    filler.engine.cache = filler.engine.new_cache()
    waiters = [Waiter() for _ in requests]
    for (text, config), waiter in zip(requests, waiters, strict=True):
        service.submit(filler.codec.encode(text), config, waiter)
    service.start()
    assert [waiter.result() for waiter in waiters] == expected
    assert service.load == (0, 0)
    for (_, config), waiter in zip(requests, waiters, strict=True):
        if config.num_beams == 1:
            grown = [*waiter.seen, waiter.search.best.generated]
            assert [len(generated) for generated in grown] == list(range(1, len(grown) + 1))


def test_rows_stay_within_the_limit(filler, service, monkeypatch):
    sizes = []
    decode = filler.engine.decode
    monkeypatch.setattr(
        filler.engine, "decode", lambda tokens, at: sizes.append(len(tokens)) or decode(tokens, at)
    )
    waiters = [Waiter() for _ in range(12)]
    for number, waiter in enumerate(waiters):
        config = CONFIGS[number % 3]
        service.submit(filler.codec.encode(TEXTS[number % 4]), config, waiter)
    service.start()
    for waiter in waiters:
        waiter.result()
    # Together, and within the limit.
    assert max(sizes) == 4


def test_a_request_can_be_dropped_while_it_runs_and_while_it_waits(filler, service):
    prompt = filler.codec.encode("the lazy dog")
    long = SearchConfig(max_new_tokens=40, num_beams=4)
    first, second, third = Waiter(), Waiter(), Waiter()
    numbers = [service.submit(prompt, long, waiter) for waiter in (first, second)]
    service.submit(prompt, CONFIGS[0], third)
    service.start()
    service.cancel(numbers[1])
    service.cancel(numbers[0])
    expected = third.result()
    assert first.search is None and second.search is None
    service.cancel(numbers[0])
    service.stop()
    assert expected == alone(filler, "the lazy dog", CONFIGS[0])


def test_what_cannot_be_answered_is_refused_at_once(filler, service):
    encode = filler.codec.encode
    with pytest.raises(GLMError, match="num_beams 5: at most 4"):
        service.submit(encode("the"), SearchConfig(num_beams=5), Waiter())
    with pytest.raises(GLMError, match="shorten"):
        service.submit(encode("the dog " * 100), SearchConfig(), Waiter())
    service.start()
    service.stop()
    with pytest.raises(StoppedError):
        service.submit(encode("the"), SearchConfig(), Waiter())


def test_more_than_may_wait_is_refused(filler, service):
    service.max_waiting = 2
    service.start()
    prompt = filler.codec.encode("the lazy dog")
    with service._changed:  # Nothing leaves the queue meanwhile.
        for _ in range(2):
            service.submit(prompt, CONFIGS[0], Waiter())
        with pytest.raises(OverloadedError, match="2 requests wait already"):
            service.submit(prompt, CONFIGS[0], Waiter())


def test_a_fault_of_the_engine_reaches_everyone(filler, service, monkeypatch):
    def broken(*args):
        raise MemoryError("no memory left")

    monkeypatch.setattr(filler.engine, "decode", broken)
    ended = threading.Event()
    service.stopped = ended.set
    waiters = [Waiter() for _ in range(6)]
    for waiter in waiters:
        service.submit(filler.codec.encode("the"), CONFIGS[0], waiter)
    service.start()
    for waiter in waiters:
        with pytest.raises(MemoryError):
            waiter.result()
    assert ended.wait(10) and isinstance(service.error, MemoryError)
    with pytest.raises(StoppedError):
        service.submit(filler.codec.encode("the"), CONFIGS[0], Waiter())


def serve_on_a_rank(tokenizer_file):
    """The driver answers, the other rank follows."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", tokenizer_file)
    source = lively_source(tokenizer._tokenizer.specials, 0.2)
    with process_group(CPU):
        layout = Layout.create(2, 1)
        filler = Filler(make_engine(source, layout), BlankCodec(tokenizer))
        if layout.is_driver:
            return answers(Service(filler, layout, max_rows=4, max_waiting=100))
        follow(filler, layout, (), lambda running: None)


def answers(service):
    service.start()
    waiters = []
    for text in TEXTS:
        for config in CONFIGS:
            waiters.append(Waiter())
            service.submit(service.filler.codec.encode(text), config, waiters[-1])
    results = [waiter.result() for waiter in waiters]
    service.stop()
    assert service.error is None
    return results


@pytest.mark.ranks
def test_two_ranks_answer_as_one(filler, tokenizer_file):
    results, nothing = run_ranks(serve_on_a_rank, tokenizer_file, world_size=2, initialize=False)
    assert nothing is None
    assert results == [alone(filler, text, config) for text in TEXTS for config in CONFIGS]
