"""What the server refuses, and that it goes on: each bad request is one clear error that names the field.

Driven by the real `openai` client against the server in a process of its own with the default model.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from solutions.tests.real_server import CONTEXT, GREEDY, MODEL

HI = [{"role": "user", "content": "hi"}]
BAD_COMPLETIONS = [  # fields, the field at fault
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["good", ""]}, "prompt"),
    ({"prompt": [1, "two"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [49152]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "word " * CONTEXT}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": CONTEXT}, "max_tokens"),
    ({"max_completion_tokens": 3}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": {"a": 1}}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True, "logprobs": 1, "stream": True}, "echo"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"49152": 1}}, "logit_bias"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop_token_ids": [49152]}, "stop_token_ids"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"priority": 1}, "priority"),  # the server schedules by arrival
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"more": True}}, "stream_options.more"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 1000}, "best_of"),
    ({"nonsense": 1}, "nonsense"),
]
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*HI, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "(("}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "root ::= nope"}, "guided_grammar"),
    ({"guided_json": {"type": 5}}, "guided_json"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"store": True}, "store"),
]


def assert_serves(client: openai.OpenAI) -> None:
    """The engine goes on serving others."""
    assert client.completions.create(**GREEDY, prompt="Hi", max_tokens=1).choices[0].finish_reason == "length"


def assert_refused(error: openai.APIStatusError, status: int, param: str | None) -> None:
    assert error.status_code == error.body["code"] == status
    assert error.param == param
    message = error.body["message"]
    assert "\n" not in message
    assert "/" not in message.replace("/v1/", "")  # no paths
    assert param is None or param.split("[")[0] in message or param in ("prompt", "messages")


@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS)
def test_a_bad_completion_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "prompt": "Hi", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Hi", extra_body=body)
    assert_refused(caught.value, 400, param)
    assert_serves(client)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            {"properties": {"a": {"items": {}, "uniqueItems": True}}},
            'the keyword "uniqueItems" at $.properties.a is not supported',
        ),
        ({"items": {"pattern": "(?<=a)b"}}, 'the keyword "pattern" at $.items is not supported: lookahead and lookbehind'),
        ({"required": True}, 'the keyword "required" at $ must be a list of strings'),
    ],
)
def test_a_schema_that_cannot_be_honoured_is_refused_with_keyword_and_path(
    client: openai.OpenAI, schema: dict[str, Any], words: str
) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for fields in ({"guided_json": schema}, {"response_format": asked}):
        (param,) = fields
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=HI, extra_body=fields)
        assert_refused(caught.value, 400, param)
        assert caught.value.body["message"].startswith(f"{param}: {words}")
    assert_serves(client)


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS)
def test_a_bad_chat_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": HI, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, extra_body=body)
    assert_refused(caught.value, 400, param)
    assert_serves(client)


def test_values_that_mean_not_set_pass(client: openai.OpenAI) -> None:
    unset = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "audio": None}
    unset |= {"stop": None, "seed": None, "logit_bias": None, "stream_options": None, "temperature": None, "user": "u"}
    answer = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1, extra_body=unset)
    assert answer.usage.completion_tokens == 1


def test_an_unknown_model_is_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="Hi")
    assert_refused(caught.value, 404, "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "x"}'],
    ids=["empty", "cut off", "list", "string", "not UTF-8", "not UTF-8 inside", "deep list", "deep object", "no prompt"],
)
def test_a_bad_body_is_a_400(url: str, client: openai.OpenAI, body: bytes) -> None:
    response = httpx.post(f"{url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert_serves(client)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(url: str, client: openai.OpenAI, value: str) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "Hi", "temperature": {value}}}'
    response = httpx.post(f"{url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")
    assert_serves(client)


def test_extreme_values_harm_nobody(client: openai.OpenAI) -> None:
    extremes = [{"temperature": 1e300}, {"top_k": 10**30}, {"min_p": 1e-300}, {"top_p": 1e-300}, {"repetition_penalty": 3e38}]
    for extreme in [*extremes, {"repetition_penalty": 1e-300}, {"stop": ["x" * 10_000]}, {"n": 128, "max_tokens": 1}]:
        body = {"prompt": "The sky is the sky is", "max_tokens": 3, **extreme}
        assert client.completions.create(model=MODEL, prompt="", extra_body=body).usage.completion_tokens in (3, 128)


def test_unknown_routes_and_methods_have_openai_errors(url: str) -> None:
    for method, path, status in (("GET", "/v2/x", 404), ("GET", "/completions", 405), ("DELETE", "/models", 405)):
        response = httpx.request(method, url + path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == status
