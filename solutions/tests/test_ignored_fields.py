"""Unknown fields change nothing but a header and the log; `--strict` refuses them as it does all that is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import httpx
import openai
import pytest

from solutions.serving.ignored_fields import HEADER
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import body, program, serve

USER = {"role": "user", "content": "hi"}
UNKNOWN: list[tuple[dict[str, Any], list[str]]] = [  # fields of a chat, and what the header says
    ({"nonsense": 1}, ["nonsense"]),
    ({"b": {"c": 1}, "a": [2]}, ["b", "a"]),
    ({"body": 1, "": 2}, ["body", '""']),
    ({"stream_options": {"body": 1}, "stream": True}, ["stream_options.body"]),
    ({"messages": [USER, {**USER, "mood": "good"}, {**USER, "mood": "bad"}]}, ["messages[].mood"]),
    ({"messages": [{**USER, "content": [{"type": "text", "text": "x", "id": 7}]}], "z": 0}, ["messages[].content[].id", "z"]),
    ({"response_format": {"type": "text", "more": 1}}, ["response_format.more"]),
    ({"line\nbreak": 1, "X: y\r\nSet-Cookie": 1}, ["line%0Abreak", "X%3A%20y%0D%0ASet-Cookie"]),
    ({"温度": 1, "a, b": 2, "tab\t\x7f": 3}, ["%E6%B8%A9%E5%BA%A6", "a%2C%20b", "tab%09%7F"]),
    ({"n" * 5000: 1}, ["n" * 100 + "..."]),
]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [USER], "max_tokens": 3, **fields}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(FakeEngine()) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def strict_url() -> Iterator[str]:
    with serve(FakeEngine(), strict=True) as url:
        yield f"{url}/v1"


@pytest.mark.parametrize(("fields", "names"), UNKNOWN, ids=[names[0][:20] for _, names in UNKNOWN])
def test_unknown_fields_are_named_and_ignored(url: str, strict_url: str, fields: dict[str, Any], names: list[str]) -> None:
    response = httpx.post(f"{url}/chat/completions", json=chat(**fields))
    assert response.status_code == 200
    assert response.headers[HEADER].split(", ") == names
    assert '"abc"' in response.text or '"content":"c"' in response.text
    refused = httpx.post(f"{strict_url}/chat/completions", json=chat(**fields))
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "unknown_parameter")
    if len(names) == 1 and "[]" not in names[0] and len(names[0]) < 50:
        assert error["param"] == unquote(names[0])
    assert HEADER not in refused.headers


def test_the_openai_client_sees_the_answer_and_the_header(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0) as client:
        asked = {"model": "fake", "messages": [USER], "max_tokens": 3, "extra_body": {"thinking": {"type": "enabled"}}}
        raw = client.chat.completions.with_raw_response.create(**asked)
        assert (raw.headers[HEADER], raw.parse().choices[0].message.content) == ("thinking", "abc")
        stream = client.chat.completions.with_raw_response.create(**asked, stream=True)
        assert stream.headers[HEADER] == "thinking"
        assert "".join(chunk.choices[0].delta.content for chunk in stream.parse()) == "abc"


def test_every_route_with_a_body_is_as_tolerant(url: str) -> None:
    root = url.removesuffix("/v1")
    for path, fields in (
        ("/v1/completions", body()), ("/tokenize", {"prompt": "hi"}), ("/detokenize", {"tokens": [104]}),
    ):  # fmt: skip
        assert httpx.post(root + path, json=fields | {"x": 1}).headers[HEADER] == "x"
        assert HEADER not in httpx.post(root + path, json=fields).headers


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"a": 1, "temperature": "hot"}, "temperature", "invalid_type"),
        ({"a": 1, "temperature": -1}, "temperature", "invalid_value"),
        ({"a": 1, "modalities": ["audio"]}, "modalities", "unsupported_parameter"),
        ({"a": 1, "messages": [{"role": "user", "b": 1}]}, "messages[0].content", "missing_required_parameter"),
        ({"a": 1, "prompt": "x"}, "prompt", "unknown_parameter"),
        ({"a": 1, "xtc_probability": 0.5}, "xtc_probability", "unsupported_parameter"),
        ({"a": 1, "model": "gpt-9"}, "model", "model_not_found"),
    ],
)
def test_what_is_wrong_besides_is_still_refused(url: str, fields: dict[str, Any], param: str, code: str) -> None:
    response = httpx.post(f"{url}/chat/completions", json=chat(**fields))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (404 if code == "model_not_found" else 400, param, code)


def test_nulls_and_neutral_values_are_no_fields(strict_url: str) -> None:
    """Also to a strict server, in every object of a body."""
    neutral = {"mirostat": 0, "typical_p": 1.0, "use_beam_search": False, "tools": [], "modalities": ["text"]}
    messages = [{"role": "user", "name": None, "content": [{"type": "text", "text": "x", "cache_control": None, "y": None}]}]
    null = {"y": None, "logit_bias": {"5": None}, "stream_options": {"include_usage": None, "z": None}, "stream": True}
    for fields in (neutral, {"messages": messages}, null, {"response_format": {"type": "text", "json_schema": None}}):
        assert httpx.post(f"{strict_url}/chat/completions", json=chat(**fields)).status_code == 200, fields


def test_many_unknown_fields_take_one_header_of_bounded_length(url: str) -> None:
    response = httpx.post(f"{url}/completions", json=body(**{f"field-{index:04}": index for index in range(2000)}))
    listed = response.headers[HEADER]
    *names, rest = listed.split(", ")
    assert len(listed) < 1100
    assert names == [f"field-{index:04}" for index in range(len(names))]
    assert rest == f"and {2000 - len(names)} more"


def test_the_log_has_a_line_for_each_combination(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for fields in ({"odd\n1": 1}, {"odd\n1": 2}, {"odd\n2": 1}, {}):
            httpx.post(f"{url}/completions", json=body(**fields))
    lines = [record.getMessage() for record in caplog.records if "ignores" in record.getMessage()]
    assert [line.split("(")[0] for line in lines] == [
        "/v1/completions ignores unknown fields: odd%0A1 ", "/v1/completions ignores unknown fields: odd%0A2 "
    ]  # fmt: skip


@pytest.mark.slow
def test_the_flag_reaches_the_server() -> None:
    for flags, status in (((), 200), (("--strict",), 400)):
        with program(*flags) as (process, url):
            assert httpx.post(f"{url}/completions", json=body(nonsense=1)).status_code == status
            process.terminate()
            logged = process.communicate()[1]
        assert ("nonsense" in logged) == (status == 200)
