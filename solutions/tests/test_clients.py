"""What real clients rely on: when the first event leaves, usage in every chunk, slashes, connections that stay."""

from __future__ import annotations

import http.client
import itertools
import json
import logging
import threading
from typing import Any

import httpx
import openai
import pytest

from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, serve
from solutions.tests.slow_cases import slow_after

HI = [{"role": "user", "content": "hi"}]
CHAT = {"model": "fake", "messages": HI, "max_tokens": 3}


@pytest.mark.parametrize(("path", "fields"), [("chat/completions", CHAT), ("completions", body(echo=True))])
def test_no_event_leaves_before_the_first_token(path: str, fields: dict[str, Any]) -> None:
    """Load generators take the time of the first chunk with a choice for the time to first token."""
    fake = FakeEngine(gate=threading.Event())
    with (
        serve(fake) as url,
        httpx.stream("POST", f"{url}/v1/{path}", json={**fields, "stream": True}, timeout=20) as response,
    ):
        assert response.status_code == 200
        assert fake.in_step.wait(10)  # the first step runs, and does not end
        lines = response.iter_lines()
        first: list[str] = []
        reader = threading.Thread(target=lambda: first.append(next(lines)))
        reader.start()
        reader.join(0.3)
        assert first == []
        fake.gate.set()
        reader.join(10)
        assert json.loads(first[0].removeprefix("data: "))["choices"]


def chunks(url: str, path: str, **fields: Any) -> list[dict[str, Any]]:
    text = httpx.post(f"{url}/v1/{path}", json={**fields, "stream": True}, timeout=20).text
    events = [event.removeprefix("data: ") for event in text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    return [json.loads(event) for event in events[:-2]]


@pytest.mark.parametrize(("path", "prompts"), [("chat/completions", 1), ("completions", 2)])
def test_continuous_usage_is_that_of_the_chunks_choice_so_far(path: str, prompts: int) -> None:
    """By counting: the fake engine writes a letter a token; prompts are of different lengths."""
    asked = {"include_usage": True, "continuous_usage_stats": True}
    with serve(FakeEngine()) as url:
        if prompts == 2:
            got = chunks(url, path, **body(prompt=["x", "yz"], n=2, echo=True, stream_options=asked))
            lengths = [1, 1, 2, 2]
        else:
            got = chunks(url, path, **CHAT, n=2, stream_options=asked)
            lengths = [len("<user>hi<assistant>")] * 2
    written = [0] * len(lengths)
    for number, chunk in enumerate(got[:-1]):
        (choice,) = chunk["choices"]
        text = choice["delta"]["content"] if prompts == 1 else choice["text"]
        index = choice["index"]
        written[index] += 0 if number < len(lengths) else len(text)  # the opening is no token
        usage = chunk["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (lengths[index], written[index])
        assert usage["total_tokens"] == lengths[index] + written[index]
    assert written == [3] * len(lengths)
    assert got[-1]["choices"] == []
    assert got[-1]["usage"]["completion_tokens"] == sum(written)


@pytest.mark.parametrize(
    ("asked", "each", "last"),
    [
        (None, False, False),
        ({"include_usage": True}, False, True),
        ({"include_usage": True, "continuous_usage_stats": False}, False, True),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"continuous_usage_stats": True}, False, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ],
)
def test_who_gets_a_usage(asked: dict[str, bool] | None, each: bool, last: bool) -> None:
    with serve(FakeEngine()) as url:
        got = chunks(url, "chat/completions", **CHAT, stream_options=asked)
    with_choices = [chunk for chunk in got if chunk["choices"]]
    assert len(with_choices) >= 2  # a reader that is late gets several tokens at once
    assert all(("usage" in chunk) == each for chunk in with_choices)
    assert (len(got) > len(with_choices)) == last


@pytest.mark.parametrize("keys", [None, ["key"]])
def test_every_route_takes_a_slash_at_its_end(keys: list[str] | None) -> None:
    with (
        serve(FakeEngine(), keys, live=True) as url,
        httpx.Client(base_url=url, headers={"Authorization": "Bearer key"}) as client,
    ):
        for path in ("/v1/models", "/v1/models/fake", "/health", "/ready", "/metrics", "/version", "/openapi.json"):
            plain, slash = client.get(path), client.get(path + "/")
            assert (plain.status_code, slash.status_code) == (200, 200), path
            if path not in ("/metrics", "/openapi.json"):
                assert plain.content == slash.content
        for path, fields in (
            ("/v1/completions", body()), ("/v1/chat/completions", CHAT), ("/tokenize", {"prompt": "hi"}),
            ("/detokenize", {"tokens": [104]}),
        ):  # fmt: skip
            assert client.post(path + "/", json=fields).status_code == 200
        assert client.get("/page/").status_code == 200
        assert client.get("/v1/nowhere/").status_code == 404
        assert httpx.get(f"{url}/health/").status_code == 200
        assert httpx.get(f"{url}/v1/models/").status_code == (401 if keys else 200)
    with serve(FakeEngine()) as url, openai.OpenAI(base_url=f"{url}/v1/", api_key="-", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["fake"]


def test_a_connection_outlives_a_bug(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a 500 the next request on the same connection is answered, and the log has the cause."""
    fake, attempts = FakeEngine(), itertools.count()
    prepare = fake.prepare

    def sometimes(*args: Any) -> Any:
        if next(attempts) % 2 == 0:
            raise KeyError("a bug in /secret/path")
        return prepare(*args)

    monkeypatch.setattr(fake, "prepare", sometimes)
    with serve(fake) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
        connection.connect()
        socket = connection.sock
        for status in (500, 200, 500, 200):
            connection.request("POST", "/v1/completions", json.dumps(body()), {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == status
            assert response.headers["X-Request-Id"]
            if status == 500:
                assert answer["error"] == {
                    "message": "internal server error", "type": "server_error", "param": None, "code": 500,
                }  # fmt: skip
        assert connection.sock is socket  # http.client would open another one
        connection.close()
    causes = [record for record in caplog.records if record.exc_info and isinstance(record.exc_info[1], KeyError)]
    assert [record.levelno for record in causes] == [logging.ERROR] * 2


@pytest.mark.parametrize(
    "error",
    slow_after(2, [KeyError("x"), RecursionError("x"), TypeError("x"), ZeroDivisionError(), ValueError("x"), OverflowError()]),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_template_may_fail_in_any_way(monkeypatch: pytest.MonkeyPatch, error: Exception, path: str) -> None:
    fake = FakeEngine()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fake.tokenizer, "apply_chat_template", fail, raising=False)
    with serve(AsyncEngine(fake)) as url:
        fields = {"messages": HI} | ({"model": "fake"} if path.startswith("/v1") else {})
        response = httpx.post(url + path, json=fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")
        assert "chat template" in response.json()["error"]["message"]


def test_a_body_may_begin_with_a_byte_order_mark_and_repeat_a_key() -> None:
    """As `json.loads` reads it: the last of equal keys counts."""
    raw = b'\xef\xbb\xbf{"model": "no", "prompt": "hi", "max_tokens": 9, "max_tokens": 2, "model": "fake"}'
    assert json.loads(raw)["max_tokens"] == 2
    with serve(FakeEngine()) as url:
        response = httpx.post(f"{url}/v1/completions", content=raw, headers={"Content-Type": "application/json"})
        assert response.json()["usage"]["completion_tokens"] == 2
        emoji = b'{"model": "fake", "prompt": "\\ud83d\\ude00", "max_tokens": 1}'  # both halves are a character
        answer = httpx.post(f"{url}/v1/completions", content=emoji, headers={"Content-Type": "application/json"})
        assert answer.json()["usage"]["prompt_tokens"] == len("😀".encode())
