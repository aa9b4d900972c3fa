"""Many clients, rude clients, and the end: places are freed, nobody waits for another, nothing is lost or mixed up."""

import concurrent.futures
import http.client
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable

import pytest
from live_server import MOSES, Answer, Live, post

from foregate.memory import disk
from foregate.memory.process import peak_memory_bytes
from foregate.serve.guard import Rules, loopback_names

LONG = {"prompt": MOSES, "max_tokens": 900, "temperature": 1, "seed": 3, "stop": ["<never>"]}
Start = Callable[..., Live]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def test_overload_is_429_with_retry_after_and_passes(start: Start) -> None:
    live = start(max_running=1, max_waiting=1)
    connections = [live.connect(post("/v1/completions", {**LONG, "stream": True})) for _ in range(2)]
    until(lambda: live.service.batcher.load() == {"running": 1, "waiting": 1})
    refused = live.complete(prompt="x")
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (refused.error["type"], refused.error["code"]) == ("rate_limit_error", "overloaded")
    assert live.get("/health").json["waiting"] == 1
    assert live.complete(prompt="x", n=3).status == 400  # could never be accepted
    for connection in connections:
        connection.close()
    assert live.idle_within(5)
    assert live.complete(prompt="x").status == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(start: Start, stream: bool) -> None:
    live = start(max_running=1, max_waiting=0)
    connection = live.connect(post("/v1/completions", {**LONG, "stream": stream}))
    until(lambda: live.service.batcher.load()["running"] == 1)
    if stream:
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
    connection.close()
    assert live.idle_within(5)
    assert live.complete(prompt=MOSES, max_tokens=3).status == 200
    assert 'foregate_replies_total{outcome="cancelled"} 1.0' in live.get("/metrics").body.decode()


def test_a_client_that_reads_nothing_delays_nobody_and_is_dropped(start: Start) -> None:
    live = start(stalled_seconds=0.5)
    body = {**LONG, "stream": True, "logprobs": 20}
    with live.connect(post("/v1/completions", body), receive_buffer=4096):
        until(lambda: live.service.batcher.load()["running"] > 0)
        assert live.complete(prompt=MOSES, max_tokens=5).status == 200
        until(lambda: 'outcome="cancelled"} 1.0' in live.get("/metrics").body.decode())
    assert live.idle_within(1)


def test_slow_heads_and_bodies_are_let_go(start: Start) -> None:
    live = start(rules=Rules(body_seconds=0.5), stalled_seconds=0.5)
    head = live.connect(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    body = live.connect(post("/v1/completions", {"prompt": "x" * 100})[:-50])
    assert live.complete(prompt=MOSES, max_tokens=3).status == 200
    assert head.recv(1000) == b""
    assert body.recv(1000).startswith(b"HTTP/1.1 408")


def test_oversized_bodies_are_413(start: Start) -> None:
    live = start(rules=Rules(max_body_bytes=1000))
    answer = live.request("POST", "/v1/completions", {"prompt": "x" * 2000})
    assert (answer.status, answer.error["type"]) == (413, "invalid_request_error")
    chunks = b"".join(b"64\r\n" + b"x" * 100 + b"\r\n" for _ in range(20))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with live.connect(head + chunks) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    with live.connect(b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert live.get("/health").status == 200


def test_a_key_is_asked_for(start: Start) -> None:
    live = start(rules=Rules(key="secret"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer é"}):
        for path in ("/v1/models", "/v1/experts", "/metrics"):
            answer = live.get(path, **headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
    assert live.get("/v1/models", Authorization="Bearer secret").status == 200
    assert [live.get(path).status for path in ("/", "/page/main.js", "/health")] == [200, 200, 200]


def test_other_names_for_this_machine_are_refused(start: Start) -> None:
    live = start(rules=Rules(hosts=loopback_names()))
    for host, status in (("localhost:80", 200), ("[::1]:1", 200), ("127.0.0.1", 200), ("evil.example", 403), ("", 403)):
        assert live.get("/health", Host=host).status == status


def test_long_prompts_do_not_starve_a_running_reply(start: Start) -> None:
    live = start(prompt_chunk=32, max_running=4)
    response = stream(live, LONG)
    next_piece(response)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        prompts = [pool.submit(live.complete, prompt="y " * 400, max_tokens=1) for _ in range(2)]
        pieces = 0
        while not all(prompt.done() for prompt in prompts):
            next_piece(response)
            pieces += 1
        assert pieces >= 10  # one a chunk, of which there are many
        assert all(prompt.result().status == 200 for prompt in prompts)
        long = pool.submit(live.complete, prompt="y " * 400, max_tokens=1)
        until(lambda: live.service.batcher.load()["running"] == 2)
        assert live.complete(prompt="x", max_tokens=1).status == 200
        assert not long.done()  # a short prompt does not wait for a long one
    response.close()


def test_a_read_error_fails_the_replies_and_the_server_goes_on(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    live = start()
    expected = live.complete(prompt=MOSES, max_tokens=10).json["choices"]

    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "preadv", broken)
        answer = live.complete(prompt="x" * 50, max_tokens=10)
        assert (answer.status, answer.error["type"]) == (500, "server_error")
        assert "cannot be read" in answer.error["message"]
        streamed = live.complete(prompt="x" * 50, max_tokens=10, stream=True).events
        assert "cannot be read" in streamed[-1]["error"]["message"]
    assert live.complete(prompt=MOSES, max_tokens=10).json["choices"] == expected
    assert live.idle_within(1)


def test_shutdown_finishes_running_replies(start: Start) -> None:
    live = start()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(live.complete, prompt=MOSES, max_tokens=60)
        until(lambda: live.service.batcher.load()["running"] == 1)
        live.server.should_exit = True
        assert reply.result().json["usage"]["completion_tokens"] == 60
    with pytest.raises(OSError):
        live.get("/health")


def stream(live: Live, body: dict) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    )
    return connection.getresponse()


def next_piece(response: http.client.HTTPResponse) -> bytes:
    line = response.readline()
    assert line.startswith(b"data: {"), line
    response.readline()
    return line


def soak(live: Live, clients: int, requests: int) -> None:
    """Each client asks for texts that say whose they are, in whole, in a stream, or leaving in the middle."""
    expected = {
        seed: live.complete(prompt=MOSES, max_tokens=8, temperature=1, seed=seed).json["choices"][0]["text"]
        for seed in range(24)
    }
    lost: list[str] = []

    def client(number: int) -> int:
        rng, answered = random.Random(number), 0
        for _ in range(requests):
            seed, way = rng.randrange(24), rng.choice(["whole", "stream", "leave", "leave at once"])
            body = {"prompt": MOSES, "max_tokens": 8, "temperature": 1, "seed": seed}
            if way.startswith("leave"):
                connection = live.connect(
                    post("/v1/completions", {**body, "max_tokens": 500, "stream": rng.random() < 0.5})
                )
                if way == "leave":
                    time.sleep(rng.random() * 0.05)
                connection.close()
                continue
            answer = live.complete(**body, stream=way == "stream")
            text = text_of(answer)
            answered += 1
            if text != expected[seed]:
                lost.append(f"{way} {seed}: {answer.status} {text!r}, not {expected[seed]!r}")
        return answered

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        assert sum(pool.map(client, range(clients))) > 0
    assert lost == []
    assert live.idle_within(10)
    assert live.service.batcher._taken == 0


def text_of(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    if answer.headers["content-type"].startswith("text/event-stream"):
        return "".join(event["choices"][0]["text"] for event in answer.events)
    return answer.json["choices"][0]["text"]


def test_sixteen_clients_with_random_disconnects(start: Start) -> None:
    soak(start(), clients=16, requests=3)


@pytest.mark.slow
def test_sixteen_clients_fifty_requests_memory_flat(start: Start) -> None:
    live = start()
    soak(live, clients=16, requests=10)  # what grows once has grown
    before, threads = peak_memory_bytes(), threading.active_count()
    soak(live, clients=16, requests=50)
    assert peak_memory_bytes() < before * 1.05
    assert threading.active_count() <= threads + 16
    assert len(os.listdir("/proc/self/fd")) < 200
    assert re.search(r'outcome="cancelled"} [1-9]', live.get("/metrics").body.decode())
