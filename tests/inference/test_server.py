"""The server under many clients: every answer is the one that its prompt gets alone."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from megatron_glm.errors import GLMError
from megatron_glm.inference.generation import run
from megatron_glm.inference.layout import Layout
from megatron_glm.inference.search import SearchConfig
from megatron_glm.inference.server import ServerConfig, bind, run_server
from megatron_glm.inference.service import Service
from tests.inference.building import lively_source, make_filler

# The whole soak test takes GLM_SOAK_SECONDS=60.
SOAK_SECONDS = float(os.environ.get("GLM_SOAK_SECONDS", "4"))
NUM_CLIENTS = 16
LIMITS = ServerConfig(port=0, max_body_bytes=2000, max_new_tokens=40)


@pytest.fixture(scope="module")
def filler(specials, tokenizer):
    return make_filler(lively_source(specials, 0.15), tokenizer)


@pytest.fixture(scope="module")
def service(filler):
    return Service(filler, Layout(), max_rows=8, max_waiting=64)


@pytest.fixture(scope="module")
def server(service):
    """The server's address."""
    addresses = []
    started = threading.Event()

    def announce(text):
        addresses.append(text.split()[-1])
        started.set()

    arguments = (service, SearchConfig(max_new_tokens=12), LIMITS, bind(LIMITS), announce)
    thread = threading.Thread(target=run_server, args=arguments)
    thread.start()
    assert started.wait(30)
    with httpx.Client(base_url=addresses[0]) as client:
        for _ in range(100):
            try:
                client.get("/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
    yield addresses[0]
    service.stop()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client


BODIES = [
    {"prompt": "the[MASK] sat on the mat"},
    {"prompt": "the quick brown fox jumps over the lazy dog and then[gMASK]", "max_new_tokens": 25},
    {"prompt": "[MASK] cat[MASK] on the[sMASK]", "max_new_tokens": 20},
    {"prompt": "dog", "max_new_tokens": 1},
    {"prompt": "the dog rests", "num_beams": 3, "length_penalty": 0.5},
    {"prompt": "the fox", "temperature": 0.8, "top_p": 0.9, "seed": 7, "max_new_tokens": 30},
    {"prompt": "", "no_repeat_ngram_size": 2},
]


@pytest.fixture(scope="module")
def expected(filler):
    """What each body gets from an engine of its own, one at a time."""
    results = []
    for body in BODIES:
        options = {key: value for key, value in body.items() if key != "prompt"}
        config = SearchConfig(**{"max_new_tokens": 12} | options)
        search = filler.search(filler.codec.encode(body["prompt"]), config)
        list(run(filler.engine, [search], 8))
        results.append(vars(filler.completion(search)))
    return results


def stream(client, body):
    """The events of a streamed answer."""
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# `expected` first: its engine is the server's, which must not run yet.
def test_many_clients_get_what_each_would_get_alone(expected, service, server):
    sizes, statuses = [], []
    decode = service.filler.engine.decode
    service.filler.engine.decode = lambda tokens, at: sizes.append(len(tokens)) or decode(
        tokens, at
    )
    deadline = time.monotonic() + SOAK_SECONDS

    def ask(number):
        answered = 0
        with httpx.Client(base_url=server, timeout=60) as client:
            while time.monotonic() < deadline:
                which = (number + answered) % len(BODIES)
                if (number + answered) % 3:
                    response = client.post("/generate", json=BODIES[which])
                    statuses.append(response.status_code)
                    result = response.json()
                else:
                    *pieces, result = stream(client, BODIES[which])
                    statuses.append(200)
                    if pieces:
                        assert shown(pieces) == result["fills"]
                assert result == expected[which], BODIES[which]
                answered += 1
        return answered

    try:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            answered = list(pool.map(ask, range(NUM_CLIENTS)))
    finally:
        del service.filler.engine.decode
    assert all(answered) and statuses == [200] * sum(answered)
    # Requests of mixed lengths shared steps, within the limit.
    assert max(sizes) == 8 and sum(sizes) / len(sizes) > 3
    assert service.load == (0, 0)


def shown(pieces):
    fills = [""] * (1 + max(piece["blank"] for piece in pieces))
    for piece in pieces:
        fills[piece["blank"]] += piece["text"]
    return fills


def test_text_is_streamed_as_it_grows(client, expected):
    *pieces, result = stream(client, BODIES[1])
    assert len(pieces) > 3
    assert shown(pieces) == result["fills"] and result == expected[1]


def test_a_client_that_goes_away_leaves_the_batch(client, service):
    body = {"prompt": "the dog", "max_new_tokens": 40, "temperature": 1.0, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 20
    while service.load != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_health(client):
    response = client.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"prompt": "x" * 2000}, 413, "2000 bytes"),
        ({"prompt": "the dog " * 60}, 400, "shorten"),
        ({"prompt": "the", "max_new_tokens": 41}, 400, "at most 40"),
        ({"prompt": "the", "max_new_tokens": 0}, 400, "max_new_tokens 0: must be at least 1"),
        ({"prompt": "the", "num_beams": 9}, 400, "at most 8"),
        ({"prompt": "the", "top_k": 3}, 400, "top_k 3: has no effect at temperature 0"),
        ({"prompt": "[gMASK][MASK]"}, 400, "only blank"),
        ({"prompt": 3}, 422, "prompt"),
        ({"prompt": "the", "max_new_tokens": "5"}, 422, "max_new_tokens"),
        ({"prompt": "the", "max_tokens": 5}, 422, "max_tokens"),
        ({}, 422, "prompt"),
        ([], 422, ""),
        (b'{"prompt": ', 422, "not JSON at character 11: Expecting value"),
        (b'{"prompt": "\\ud800"}', 400, "holds '\\ud800' at character 0"),
        (b"\xff\xfe", 422, ""),
        (b"", 422, ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_answered_is_refused_as_json(client, body, status, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = client.post(
        "/generate", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == ("too_large" if status == 413 else "invalid_request")
    assert message in error["message"]


def test_what_is_not_announced_as_json_is_refused(client):
    response = client.post("/generate", data={"prompt": "the"})
    assert response.status_code == 415
    assert "must be application/json" in response.json()["error"]["message"]


def test_a_port_in_use_is_named():
    with bind(LIMITS) as bound:
        taken = bound.getsockname()[1]
        bound.listen()
        with pytest.raises(GLMError, match=f"--host 127.0.0.1 --port {taken}: .*already in use"):
            bind(replace(LIMITS, port=taken))


def test_an_address_of_another_machine_is_named():
    with pytest.raises(GLMError, match="--host 192.0.2.1 --port 0: "):
        bind(replace(LIMITS, host="192.0.2.1"))


def test_a_body_of_unknown_length_is_cut_off(client):
    def chunks():
        for _ in range(30):
            yield b" " * 100

    response = client.post(
        "/generate", content=chunks(), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["type"] == "too_large"


@pytest.mark.parametrize("method, path, status", [("GET", "/generate", 405), ("GET", "/x", 404)])
def test_other_requests_are_refused_as_json(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
