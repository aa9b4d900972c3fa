"""The API as clients use it: the official openai client and plain HTTP against a real server."""

import concurrent.futures
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import MOSES, Live
from openai import BadRequestError, NotFoundError
from prometheus_client.parser import text_string_to_metric_families

import foregate
from foregate.model.generate import generate

PROMPTS = (MOSES, "def read(self, path):\n    ", "Debian ist ein Betriebssystem", "a dog, n. [")


@pytest.fixture(scope="module")
def alone(live: Live, demo_store: Path) -> dict[str, str]:
    """What `foregate generate` writes: prompt -> text of 40 tokens."""
    model, tokenizer = foregate.load(demo_store, memory="100%", threads=1), live.service.encoder.tokenizer
    texts = {prompt: generate(model, tokenizer, prompt, max_new_tokens=40).text for prompt in PROMPTS}
    model.foregate.close()
    return texts


def test_a_greedy_reply_is_what_generate_writes_in_any_company(live: Live, alone: dict[str, str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [prompt for prompt in PROMPTS for _ in range(2)]
        noise = pool.submit(live.complete, prompt="zzz" * 30, max_tokens=60, temperature=1.5)
        answers = list(pool.map(lambda prompt: live.complete(prompt=prompt, max_tokens=40), asked))
        assert noise.result().status == 200
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.json["choices"][0]["text"] == alone[prompt]
        assert answer.json["choices"][0]["finish_reason"] in ("length", "stop")


def test_a_stream_is_the_same_text_in_pieces(live: Live, alone: dict[str, str]) -> None:
    answer = live.complete(prompt=MOSES, max_tokens=40, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = answer.events
    assert len(chunks) > 10
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == alone[MOSES]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 40)


def test_chat_with_the_openai_client(live: Live) -> None:
    asked = {"model": "demo", "messages": [{"role": "user", "content": MOSES}], "temperature": 0, "max_tokens": 20}
    whole = live.openai.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert (whole.object, whole.choices[0].finish_reason) == ("chat.completion", "length")
    assert whole.usage.completion_tokens == 20
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 20
    stream = list(live.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == text
    assert stream[0].choices[0].delta.role == "assistant"
    assert stream[-1].usage == whole.usage
    assert live.openai.models.list().data[0].id == "demo"
    assert live.openai.models.retrieve("demo").owned_by == "foregate"


def test_openai_client_sees_errors(live: Live) -> None:
    with pytest.raises(NotFoundError, match="no model 'gpt-9' here") as caught:
        live.openai.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(BadRequestError, match="the context holds 1024") as caught:
        live.openai.completions.create(model="demo", prompt="word " * 3000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


def test_chat_logprobs(live: Live) -> None:
    choice = live.chat(MOSES, max_tokens=6, logprobs=True, top_logprobs=3).json["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == choice["message"]["content"]
    for entry in entries:
        tops = entry["top_logprobs"]
        assert len(tops) == 3
        assert tops[0]["token"] == entry["token"]  # greedy
        assert [top["logprob"] for top in tops] == sorted((top["logprob"] for top in tops), reverse=True)
        assert bytes(entry["bytes"]).decode() == entry["token"]
    streamed = [e["choices"][0] for e in live.chat(MOSES, max_tokens=6, logprobs=True, stream=True).events]
    tokens = [entry for part in streamed if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert [token["logprob"] for token in tokens] == [entry["logprob"] for entry in entries]


def test_echo_gives_the_prompts_logprobs(live: Live, demo_store: Path) -> None:
    choice = live.complete(prompt=MOSES, max_tokens=1, echo=True, logprobs=2).json["choices"][0]
    model = foregate.load(demo_store, memory="100%", threads=1)
    ids = live.service.encoder.tokenizer(MOSES, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logprobs = model(ids).logits[0].log_softmax(-1)
    model.foregate.close()
    wanted = [*logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist(), logprobs[-1].max().item()]
    assert choice["text"].startswith(MOSES)
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert all(len(top) <= 2 for top in choice["logprobs"]["top_logprobs"][1:])
    nothing = live.complete(prompt=MOSES, max_tokens=0, echo=True, logprobs=0).json
    assert nothing["usage"]["completion_tokens"] == 0
    assert nothing["choices"][0]["text"] == MOSES


def test_stop_strings_end_the_text_before_them(live: Live, alone: dict[str, str]) -> None:
    text = alone[MOSES]
    stop = text[20:23]
    for stops in (stop, [stop, "never"]):
        choice = live.complete(prompt=MOSES, max_tokens=40, stop=stops).json["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    streamed = live.complete(prompt=MOSES, max_tokens=40, stop=stop, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in streamed) == text[: text.index(stop)]


def test_a_seed_decides_in_any_company(live: Live) -> None:
    def sample(seed: int) -> str:
        return live.complete(prompt=MOSES, max_tokens=25, temperature=1, seed=seed).json["choices"][0]["text"]

    first = [sample(1), sample(2)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        again = list(pool.map(sample, [1, 2, 3, 4, 1, 2]))
    assert first[0] != first[1]
    assert again[:2] == again[4:] == first
    several = live.complete(prompt=MOSES, max_tokens=25, temperature=1, seed=1, n=2).json["choices"]
    assert [choice["text"] for choice in several] == first


def test_several_prompts_as_texts_and_tokens(live: Live, alone: dict[str, str]) -> None:
    ids = live.service.encoder.tokenizer(PROMPTS[1])["input_ids"]
    answer = live.complete(prompt=[PROMPTS[0], ids], max_tokens=40).json
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert [choice["text"] for choice in answer["choices"]] == [alone[PROMPTS[0]], alone[PROMPTS[1]]]
    assert live.complete(prompt=ids, max_tokens=40).json["choices"][0]["text"] == alone[PROMPTS[1]]


def test_a_reply_ends_where_the_context_does(live: Live) -> None:
    answer = live.complete(prompt="a" * 990, max_tokens=10_000).json
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")
    assert answer["usage"]["total_tokens"] <= 1024


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("completions", {}, "Field required", "prompt"),
        ("completions", {"prompt": []}, "prompt", None),
        ("completions", {"prompt": [9999]}, "token 9999 is not one of the model's 3072", "prompt"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "valid number", "temperature"),
        ("completions", {"prompt": "x", "temperature": -1}, "greater than or equal to 0", "temperature"),
        ("completions", {"prompt": "x", "top_p": 0}, "greater than 0", "top_p"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "at least 1 is needed", None),
        ("completions", {"prompt": "x", "max_tokens": True}, "valid integer", "max_tokens"),
        ("completions", {"prompt": "x", "n": 1000}, "less than or equal to 16", "n"),
        ("completions", {"prompt": ["x"] * 16, "n": 16}, "256 replies at once", "n"),
        ("completions", {"prompt": "x", "stop": ""}, "at least 1 character", "stop"),
        ("completions", {"prompt": "x", "nonsense": 1}, "does not know the parameter", "nonsense"),
        ("completions", {"prompt": "x", "seed": 2**70}, None, "seed"),
        ("completions", {"prompt": "x", "stream_options": {}}, "only for stream=true", None),
        ("completions", {"prompt": "x", "frequency_penalty": 1}, "0", "frequency_penalty"),
        ("completions", {"prompt": "\ud800"}, "unicode", "prompt"),
        ("completions", {"prompt": "x", "\ud800": 1}, "unicode", None),
        ("chat/completions", {"messages": []}, "at least 1 item", "messages"),
        ("chat/completions", {"messages": [{"role": "boss", "content": "x"}]}, "system", "messages.0.role"),
        ("chat/completions", {"messages": "x"}, "valid list", "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None, None),
        ("chat/completions", {"messages": [{"role": "user", "content": "y" * 9000}]}, "shorten it", "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2},
            "logprobs=true",
            None,
        ),
        ("chat/completions", [1, 2], "dictionary", None),
    ],
)
def test_bad_requests_are_400_in_openais_shape(live: Live, path: str, body, message, param) -> None:
    answer = live.request("POST", f"/v1/{path}", body)
    assert answer.status == 400, answer.body
    assert answer.error["type"] == "invalid_request_error"
    assert "\n" not in answer.error["message"]
    assert message is None or message in answer.error["message"]
    assert param is None or answer.error["param"].startswith(param)


@pytest.mark.parametrize("body", [b"", b"{", b"nul", b'{"prompt": NaN}', b"[" * 100_000, b"\xff\xfe", b"1" * 5000])
def test_bodies_that_are_no_json(live: Live, body: bytes) -> None:
    answer = live.request("POST", "/v1/completions", body)
    assert answer.status == 400
    assert answer.error["message"]
    unmarked = live.request("POST", "/v1/completions", b'{"prompt": "x"}', {"Content-Type": "text/plain"})
    assert (unmarked.status, "Content-Type: application/json" in unmarked.error["message"]) == (400, True)


def test_unknown_paths_and_methods(live: Live) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/", 405)):
        answer = live.request(method, path)
        assert answer.status == status
        assert path in answer.error["message"]


@pytest.mark.parametrize(
    "path", ["/page/../app.py", "/page/..%2f..%2fconfig.py", "/page//etc/passwd", "/page/%00", "/../etc/passwd"]
)
def test_the_pages_folder_is_all_that_can_be_read(live: Live, path: str) -> None:
    with live.connect(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()) as connection:
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))


def test_the_page_allows_no_outside_resources(live: Live) -> None:
    for path in ("/", "/page/main.js", "/page/style.css"):
        answer = live.get(path)
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert b"http://" not in answer.body
        assert b"https://" not in answer.body


def test_health_metrics_and_experts_agree(live: Live) -> None:
    live.complete(prompt=MOSES, max_tokens=10)
    assert live.get("/health").json == {"status": "ok", "running": 0, "waiting": 0}
    experts, metrics = experts_and_metrics(live)
    families = text_string_to_metric_families(metrics)
    samples = [sample for family in families for sample in family.samples]
    values = {sample.name: sum(s.value for s in samples if s.name == sample.name) for sample in samples}
    assert values["foregate_expert_hits_total"] == experts["totals"]["hits"]
    assert values["foregate_expert_misses_total"] == experts["totals"]["misses"]
    assert values["foregate_expert_read_bytes_total"] == experts["totals"]["bytes_read"] > 0
    fates = ("foregate_prefetches_total", "foregate_prefetched_bytes_total")
    assert {frozenset(s.labels) for s in samples if s.name in fates} == {frozenset(("layer", "fate"))}
    assert {s.labels["fate"] for s in samples if s.name in fates} == {"in_time", "late", "wasted"}
    assert 0 < values["foregate_prefetches_total"] <= values["foregate_prefetches_started_total"]
    assert 0 < values["foregate_prefetched_bytes_total"] <= values["foregate_expert_read_bytes_total"]
    foreseen = {s.labels["horizon"] for s in samples if s.name == "foregate_predicted_experts_found_total"}
    assert foreseen == {"1", "2", "3"}
    assert 0 < values["foregate_predicted_experts_found_total"] < values["foregate_predicted_experts_chosen_total"]
    assert 0 < values["foregate_predicted_experts_right_total"] < values["foregate_predicted_experts_sure_total"]
    assert values["foregate_replies_running"] == values["foregate_replies_waiting"] == 0
    assert values["foregate_generated_tokens_total"] >= 10
    assert experts["tokens_per_second"] > 0
    assert math.isfinite(values["foregate_tokens_per_second"])
    layers = experts["layers"]
    assert len(layers) == 12
    assert experts["slots"] == 24
    assert 0 < sum(len(layer["resident"]) for layer in layers) <= 24  # the others may be on their way
    for layer in layers:
        assert len(layer["chosen"]) == layer["top_k"] == 2
        assert set(layer["missed"]) <= set(layer["chosen"]) <= set(range(layer["num_experts"]))
        assert set(layer["fetching"]).isdisjoint(layer["resident"])


def experts_and_metrics(live: Live) -> tuple[dict[str, Any], str]:
    """Of the same moment: the last prefetches may arrive after a reply."""
    before = live.get("/v1/experts").json
    for _ in range(50):
        metrics, after = live.get("/metrics").body.decode(), live.get("/v1/experts").json
        if before["totals"] == after["totals"]:
            return after, metrics
        before = after
    raise AssertionError("an idle server keeps counting")
