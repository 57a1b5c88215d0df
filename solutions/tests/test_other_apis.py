"""The Responses API and the Messages API by their makers' own clients, against a real server."""

from __future__ import annotations

import json
import threading
from typing import Any

import anthropic
import httpx
import openai
import pytest

from solutions.serving.responses_store import ResponseStore, StoredResponse
from solutions.tests.fake_engine import FakeEngine
from solutions.tests.fake_server import FOREVER, serve, until
from solutions.tests.real_server import MODEL

WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
FUNCTION = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city",
    "parameters": WEATHER,
    "strict": True,
}
ASKED = "What is the weather in Paris?"


@pytest.fixture(scope="module")
def claude(url: str) -> Any:
    with anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def test_a_response_is_the_chat_s_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0}
    chat = client.chat.completions.create(
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}],
        max_tokens=12, logprobs=True, top_logprobs=2, **settings,
    )  # fmt: skip
    response = client.responses.create(
        instructions="Be brief.", input="Name a colour.", max_output_tokens=12, include=["message.output_text.logprobs"],
        top_logprobs=2, **settings,
    )  # fmt: skip
    assert response.output_text == chat.choices[0].message.content
    assert response.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert (response.usage.input_tokens, response.usage.output_tokens) == (
        chat.usage.prompt_tokens,
        chat.usage.completion_tokens,
    )
    scores = response.output[0].content[0].logprobs
    assert [each.logprob for each in scores] == [each.logprob for each in chat.choices[0].logprobs.content]
    with client.responses.stream(
        instructions="Be brief.", input="Name a colour.", max_output_tokens=12, **settings
    ) as stream:  # fmt: skip
        events = list(stream)
    assert events[0].type == "response.created"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == response.output_text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == response.output_text


def test_turns_follow_each_other_and_can_be_fetched_and_deleted(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 8}
    first = client.responses.create(input="My name is Ada.", instructions="Be brief.", metadata={"a": "b"}, **settings)
    second = client.responses.create(input="What is my name?", previous_response_id=first.id, **settings)
    items = [
        {"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]  # fmt: skip
    by_hand = client.responses.create(input=items, store=False, **settings)
    assert (second.output_text, second.usage.input_tokens) == (by_hand.output_text, by_hand.usage.input_tokens)
    fetched = client.responses.retrieve(first.id)
    assert (fetched.output_text, fetched.metadata, fetched.instructions) == (first.output_text, {"a": "b"}, "Be brief.")
    listed = client.responses.input_items.list(first.id)
    assert [item.content[0].text for item in listed.data] == ["My name is Ada."]
    client.responses.delete(first.id)
    for missing in (first.id, by_hand.id, "resp_no"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(missing)
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(input="x", previous_response_id=first.id, **settings)
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")


def test_background_responses_are_fetched_or_cancelled(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0, "background": True}
    short = client.responses.create(input="Say hi.", max_output_tokens=3, **settings)
    assert short.status == "in_progress"
    while short.status == "in_progress":
        short = client.responses.retrieve(short.id)
    assert (short.status, short.usage.output_tokens) == ("incomplete", 3)
    endless = client.responses.create(input="Count to a million.", max_output_tokens=400, **settings)
    assert client.responses.cancel(endless.id).status == "cancelled"
    assert client.responses.retrieve(endless.id).status == "cancelled"
    plain = client.responses.create(model=MODEL, input="Hi", max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="background: true"):
        client.responses.cancel(plain.id)
    for extra in ({"stream": True}, {"store": False}):
        with pytest.raises(openai.BadRequestError, match="background needs"):
            client.responses.create(input="x", **settings, **extra)


def test_tools_and_schemas_of_responses(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [FUNCTION], "input": ASKED, "tool_choice": "required"}
    answer = client.responses.create(**asked, max_output_tokens=60, parallel_tool_calls=False)
    (call,) = answer.output
    assert (call.type, call.name, json.loads(call.arguments).keys()) == ("function_call", "get_weather", {"city"})
    with client.responses.stream(**asked, max_output_tokens=60, parallel_tool_calls=False) as stream:
        whole = stream.get_final_response()
    assert [(item.name, item.arguments) for item in whole.output] == [(call.name, call.arguments)]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}
    after = client.responses.create(
        model=MODEL, input=[result], previous_response_id=answer.id, tools=[FUNCTION], tool_choice="none", max_output_tokens=8
    )  # fmt: skip
    assert after.output[0].type == "message"
    form = {"type": "json_schema", "name": "city", "schema": WEATHER, "strict": True}
    answer = client.responses.create(model=MODEL, input=ASKED, text={"format": form}, max_output_tokens=60)
    assert json.loads(answer.output_text).keys() == {"city"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"type": "computer_call"}]}, "input[0].type"), ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"temperature": -1}, "temperature"), ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "some"}, "truncation"), ({"top_k": "x"}, "top_k"), ({"structured_outputs": {}}, "structured_outputs"),
        ({"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"), ({"input": "x " * 600}, "input"), ({"model": "no"}, "model"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"input": 3}, "input"),
    ],
)  # fmt: skip
def test_a_response_that_cannot_be_is_refused_by_field(url: str, fields: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{url}/responses", json={"model": MODEL, "input": "x", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404 if param == "model" else 400, param), answer.text


def test_vllm_s_fields_hold_in_responses_too(client: openai.OpenAI) -> None:
    """Each by an answer that is known, or is the chat's."""

    def say(text: str = "Name a colour.", **more: Any) -> str:
        return client.responses.create(model=MODEL, input=text, max_output_tokens=8, extra_body=more).output_text

    plain = say(temperature=0)
    assert say(top_k=1) == plain
    assert say(seed=7) == say(seed=7)
    assert say(temperature=0, stop=[plain[3:6]]) == plain[:3]
    assert say(structured_outputs={"choice": ["teal"]}) == "teal"
    assert say(temperature=0, logit_bias={"32": 100}) == "0" * 8
    assert say("word " * 600, truncation="auto", allowed_token_ids=[32]).startswith("0")
    functions = [FUNCTION, FUNCTION | {"name": "now"}]
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    answer = client.responses.create(
        model=MODEL, input=ASKED, tools=functions, tool_choice=allowed, parallel_tool_calls=False, max_output_tokens=60
    )
    assert [item.name for item in answer.output] == ["now"]
    form = {"type": "json_schema", "name": "x", "schema": {"type": "colour"}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format: the keyword") as caught:
        client.responses.create(model=MODEL, input="x", text={"format": form})
    assert caught.value.param == "text.format"


def test_a_message_may_begin_the_answer_and_ask_for_a_form(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    begun: list[Any] = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    asked: dict[str, Any] = {"model": MODEL, "max_tokens": 8}
    more = {"continue_final_message": True, "add_generation_prompt": False}
    chat = client.chat.completions.create(**asked, messages=begun, temperature=0, extra_body=more)
    message = claude.messages.create(**asked, messages=begun, extra_body={"temperature": 0})
    assert message.content[0].text == chat.choices[0].message.content
    counted = claude.messages.count_tokens(model=MODEL, messages=begun)
    assert counted.input_tokens == chat.usage.prompt_tokens
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"const": "é"}}, "required": ["a"]}}
    for fields in ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form}):
        formed = claude.messages.create(**asked | {"max_tokens": 30}, messages=begun[:1], extra_body=fields)
        assert json.loads(formed.content[0].text) == {"a": "é"}
    wrong = {"output_config": {"format": form | {"schema": {"type": "colour"}}}}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format: the keyword"):
        claude.messages.create(**asked, messages=begun[:1], extra_body=wrong)


def test_a_message_is_the_chat_s_answer(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    chat = client.chat.completions.create(
        model=MODEL, temperature=0, max_tokens=12, stop=["zz"],
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}],
    )  # fmt: skip
    asked: dict[str, Any] = {
        "model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": 12, "system": "Be brief.", "stop_sequences": ["zz"],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}],
    }  # fmt: skip
    message = claude.messages.create(**asked)
    assert message.content[0].text == chat.choices[0].message.content
    assert message.stop_reason == ("max_tokens" if chat.choices[0].finish_reason == "length" else "end_turn")
    tokens = message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    assert (tokens, message.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    with claude.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == message.content[0].text
        assert stream.get_final_message().stop_reason == message.stop_reason
    counted = claude.messages.count_tokens(model=MODEL, system="Be brief.", messages=asked["messages"])
    assert counted.input_tokens == tokens
    cut = claude.messages.create(**{**asked, "stop_sequences": [message.content[0].text[2:5]]})
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", message.content[0].text[2:5])
    assert cut.content[0].text == message.content[0].text[:2]


def test_tools_of_messages(claude: anthropic.Anthropic) -> None:
    tool = {"name": "get_weather", "description": "Weather in a city", "input_schema": WEATHER}
    asked: dict[str, Any] = {
        "model": MODEL, "extra_body": {"temperature": 0}, "max_tokens": 60, "tools": [tool],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": ASKED}]
    answer = claude.messages.create(messages=messages, **asked)
    (call,) = answer.content
    assert (answer.stop_reason, call.type, call.name, call.input.keys()) == ("tool_use", "tool_use", "get_weather", {"city"})
    with claude.messages.stream(messages=messages, **asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    messages += [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(messages=messages, **{**asked, "tool_choice": {"type": "none"}, "max_tokens": 8})
    assert after.content[0].type == "text"
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": [{"type": "image"}]}])


def entry(name: str, size: int = 10) -> StoredResponse:
    return StoredResponse({"id": name, "text": "x" * size}, [], [])


def test_the_store_is_bounded_and_tenants_see_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("solutions.serving.responses_store.time.monotonic", lambda: now[0])
    store = ResponseStore(max_bytes=1000, expiry_seconds=60)
    store.finish("a", entry("one"))
    assert store.get("b", "one") is None
    assert store.get(None, "one") is None
    assert store.get("a", "one") is not None
    assert not store.delete("b", "one")
    for number in range(30):  # each of about 110 bytes
        store.finish("a", entry(f"r{number}", 60))
    there = [number for number in range(30) if store.get("a", f"r{number}") is not None]
    assert there == list(range(30 - len(there), 30))
    assert 5 <= len(there) <= 12
    for number in there[:-1]:  # what is deleted leaves room
        assert store.delete("a", f"r{number}")
    for number in there[:-1]:
        store.finish("a", entry(f"n{number}", 60))
    assert all(store.get("a", name) is not None for name in ["r29", *(f"n{number}" for number in there[:-1])])
    now[0] = 159.9
    assert store.get("a", "r29") is not None
    now[0] = 160.0
    assert store.get("a", "r29") is None
    cancelled: list[str] = []
    endless = entry("endless")
    endless.cancel = lambda: cancelled.append("endless")
    store.add("a", endless)
    now[0] = 1000.0
    assert store.get("a", "endless") is endless
    assert store.delete("a", "endless")
    assert cancelled == ["endless"]
    store.finish("a", entry("large", 2000))  # alone above the limit
    assert store.get("a", "large") is None


def test_keys_come_either_way_and_each_sees_its_own_responses() -> None:
    with serve(FakeEngine(), ["one", "two"]) as url, httpx.Client(base_url=f"{url}/v1") as http:
        body = {"model": "fake", "input": "x", "max_output_tokens": 2}
        made = http.post("/responses", json=body, headers={"Authorization": "Bearer one"}).json()
        paths = [f"/responses/{made['id']}", f"/responses/{made['id']}/input_items"]
        for headers, status in (
            ({"x-api-key": "one"}, 200), ({"x-api-key": "two"}, 404), ({"x-api-key": "three"}, 401),
            ({}, 401), ({"x-api-key": ""}, 401),
            ({"x-api-key": "one", "Authorization": "Bearer three"}, 401),
        ):  # fmt: skip
            assert [http.get(path, headers=headers).status_code for path in paths] == [status] * 2, headers
        stolen = {**body, "previous_response_id": made["id"]}
        assert http.post("/responses", json=stolen, headers={"x-api-key": "two"}).status_code == 400
        message = {"model": "fake", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]}
        assert http.post("/messages", json=message, headers={"x-api-key": "two"}).json()["content"][0]["text"] == "ab"


ASKS = {
    "responses": {"model": "fake", "input": "x", "stream": True, "max_output_tokens": FOREVER},
    "messages": {"model": "fake", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": FOREVER},
}


@pytest.mark.parametrize(("route", "last"), [("responses", "response.failed"), ("messages", "error")])
def test_a_stream_of_an_engine_that_fails_says_so_last(route: str, last: str) -> None:
    with serve(FakeEngine(fail_at=4)) as url:
        answer = httpx.post(f"{url}/v1/{route}", json=ASKS[route])
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    named = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert named == [event["type"] for event in events]
    assert (answer.status_code, named[-1], named.count(last)) == (200, last, 1)
    assert "/secret/path" not in answer.text
    if route == "responses":
        assert (events[-1]["response"]["status"], events[-1]["response"]["output"][0]["content"][0]["text"]) == (
            "failed",
            "abc",
        )


def events_of(answer: httpx.Response) -> list[str]:
    return [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]


def test_an_engine_that_fails_before_the_first_token_is_told_after_the_beginning() -> None:
    for route, expected in (
        ("responses", ["response.created", "response.in_progress", "response.failed"]), ("messages", ["message_start", "error"])
    ):  # fmt: skip
        with serve(FakeEngine(fail_at=1)) as url:
            assert events_of(httpx.post(f"{url}/v1/{route}", json=ASKS[route])) == expected


USE = {"type": "tool_use", "id": "c1", "name": "f", "input": {}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("responses", {"input": [{"type": "function_call_output", "call_id": "c9", "output": ""}]}, "input"),
    ("responses", {"input": [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}]}, "input"),
    ("responses", {"input": [{"role": "no such role!", "content": ""}]}, "input"), ("responses", {"input": []}, "input"),
    ("responses", {"conversation": "conv_1"}, "conversation"), ("responses", {"prompt": {"id": "pmpt_1"}}, "prompt"),
    ("responses", {"tools": [FUNCTION], "tool_choice": 3}, "tool_choice"),
    ("messages", {"messages": [{"role": "assistant", "content": [USE]}, {"role": "user", "content": "x"}]}, "messages"),
    ("messages", {"tools": [{"name": "f"}], "tool_choice": {"type": []}}, "tool_choice.type"),
    ("messages", {"tools": [{"name": "f"}], "tool_choice": {"type": "tool"}}, "tool_choice"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "change", "param"), REFUSED, ids=[f"{route} {param} {i}" for i, (route, _, param) in enumerate(REFUSED)]
)
def test_errors_name_the_fields_of_the_api_that_was_asked(route: str, change: dict[str, Any], param: str) -> None:
    with serve(FakeEngine()) as url:
        answer = httpx.post(f"{url}/v1/{route}", json={**ASKS[route], "stream": False, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert "messages[" not in error["message"]


def test_errors_of_messages_are_anthropic_s() -> None:
    asked: dict[str, Any] = {"model": "fake", "max_tokens": 3, "messages": [{"role": "user", "content": "x"}]}
    with serve(FakeEngine(fail_at=1), ["key"], max_body_bytes=1000) as url:
        kinds = []
        for key, change in (
            ("wrong", {}), ("key", {"max_tokens": 0}), ("key", {"model": "no"}), ("key", {"system": "x" * 2000}),
            ("key", {"messages": []}), ("key", {}), ("key", {}),
        ):  # fmt: skip
            answer = httpx.post(f"{url}/v1/messages", json=asked | change, headers={"x-api-key": key})
            assert int(answer.headers["content-length"]) == len(answer.content)
            if answer.status_code == 200:
                continue
            body = answer.json()
            assert (body["type"], answer.status_code >= 400) == ("error", True)
            assert "x-request-id" in answer.headers
            kinds.append((answer.status_code, body["error"]["type"]))
        other = httpx.post(f"{url}/v1/responses", json={}, headers={"x-api-key": "wrong"}).json()
        assert other.keys() == {"error"}
    assert kinds == [
        (401, "authentication_error"), (400, "invalid_request_error"), (404, "not_found_error"), (413, "request_too_large"),
        (400, "invalid_request_error"), (503, "overloaded_error"), (503, "overloaded_error"),
    ]  # fmt: skip


def test_what_clients_send_besides_changes_nothing() -> None:
    tool = {"name": "f", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}}
    with serve(FakeEngine()) as url:
        for route, more in (
            (
                "responses",
                {"tools": [{**FUNCTION, "defer_loading": True}], "tool_choice": "none", "reasoning": {"effort": "low"}},
            ),
            ("messages", {"tools": [tool], "tool_choice": {"type": "none"}, "thinking": {"type": "disabled"}}),
        ):
            body = {name: value for name, value in ASKS[route].items() if "max" not in name}
            limit = {"max_output_tokens": 2} if route == "responses" else {"max_tokens": 2}
            answer = httpx.post(f"{url}/v1/{route}", json={**body, **limit, "stream": False, **more})
            assert answer.status_code == 200, answer.text


def test_a_response_in_progress_has_no_next_turn() -> None:
    gate = threading.Event()
    with serve(FakeEngine(gate=gate)) as url, httpx.Client(base_url=f"{url}/v1/responses") as http:
        made = http.post("", json={"model": "fake", "input": "x", "background": True, "max_output_tokens": 2}).json()
        following = {"model": "fake", "input": "y", "previous_response_id": made["id"], "max_output_tokens": 2}
        refused = http.post("", json=following)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "previous_response_id")
        gate.set()
        until(lambda: http.get(f"/{made['id']}").json()["status"] != "in_progress")
        assert http.post("", json=following).status_code == 200


@pytest.mark.parametrize("route", ASKS)
def test_a_client_that_leaves_ends_its_request(route: str) -> None:
    engine = FakeEngine()
    with serve(engine) as url:
        with httpx.stream("POST", f"{url}/v1/{route}", json=ASKS[route]) as answer:
            next(line for line in answer.iter_lines() if "delta" in line)
        until(lambda: not engine.running)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_a_background_response_that_nobody_wants_leaves_the_engine(way: str) -> None:
    engine = FakeEngine()
    with serve(engine) as url, httpx.Client(base_url=f"{url}/v1/responses") as http:
        made = http.post("", json={"model": "fake", "input": "x", "background": True, "max_output_tokens": FOREVER}).json()
        until(lambda: engine.running)
        answer = http.post(f"/{made['id']}/cancel") if way == "cancel" else http.delete(f"/{made['id']}")
        assert answer.status_code == 200
        until(lambda: not engine.running)
        assert http.get(f"/{made['id']}").status_code == (200 if way == "cancel" else 404)
