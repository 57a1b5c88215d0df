"""Events of the Responses API and of the Messages API: the makers' own clients add them up to the whole answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from solutions.serving.errors import RequestError
from solutions.serving.messages_events import MessageBuilder
from solutions.serving.messages_request import MessagesRequest
from solutions.serving.openai_answers import Usage
from solutions.serving.responses_events import ResponseBuilder
from solutions.serving.responses_request import ResponsesRequest
from solutions.serving.translated_wire import AnswerBuilder

TEXT = st.text('aé\n\u2028🙂"', min_size=1, max_size=4)
CALL = st.tuples(st.sampled_from(["f", "get_weather"]), st.lists(TEXT, max_size=3))
ANSWERS = st.tuples(st.lists(TEXT, max_size=3), st.lists(CALL, max_size=3), st.lists(TEXT, max_size=1))
"""Texts, calls with the texts of their arguments, and texts after the calls, each in pieces."""
REASONS = st.sampled_from(["stop", "length", "tool_calls"])
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
MESSAGE_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USAGE = Usage(prompt_tokens=3, completion_tokens=4, total_tokens=7)


def feed(builder: AnswerBuilder, answer: Any) -> Iterator[dict[str, Any]]:
    texts, calls, rest = answer
    for each in texts:
        yield from builder.text(each, [])
    for index, (name, pieces) in enumerate(calls):
        yield from builder.call(index, f"call_{index}", name, "")
        for piece in [f'{{"x": {json.dumps("".join(pieces))}', "}"] if pieces else []:
            yield from builder.call(index, None, None, piece)
    for each in rest:
        yield from builder.text(each, [])


@settings(deadline=None, max_examples=60)
@given(ANSWERS, REASONS)
def test_a_response_s_events_add_up(answer: Any, reason: str) -> None:
    request = ResponsesRequest(
        model="m", input="x", tools=[{"type": "function", "name": "f", "parameters": {}, "strict": False}]
    )
    builder = ResponseBuilder("resp_1", 5, "m", request.echo({}))
    events = [*builder.begin(USAGE), *feed(builder, answer), *builder.end(reason, None, USAGE)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state: Any = ResponseStreamState(input_tools=omit, text_format=omit)
    snapshot: Any = None
    for event in json.loads(json.dumps(events)):
        typed = RESPONSE_EVENT.validate_python(event)
        state.handle_event(typed)
        snapshot = state.accumulate_event(typed) if snapshot is None else snapshot
    whole = Response.model_validate(builder.answer)
    texts, calls, rest = answer
    assert whole.output_text == "".join(texts + rest)
    kinds = (["message"] if texts or not (calls or rest) else []) + ["function_call"] * len(calls)
    if rest and (calls or not texts):
        kinds.append("message")
    assert [item.type for item in whole.output] == kinds
    assert {item.status for item in whole.output[:-1]} <= {"completed"}
    assert whole.status == ("incomplete" if reason == "length" else "completed")
    assert json.loads(json.dumps(events[-1]["response"])) == json.loads(json.dumps(builder.answer))
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == builder.answer["output"]
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == whole.output_text
    arguments = "".join(event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta")
    assert arguments == "".join(item.arguments for item in whole.output if item.type == "function_call")


@settings(deadline=None, max_examples=60)
@given(ANSWERS, REASONS)
def test_a_message_s_events_add_up(answer: Any, reason: str) -> None:
    builder = MessageBuilder("msg_1", "m")
    events = [*builder.begin(USAGE), *feed(builder, answer), *builder.end(reason, None, USAGE)]
    snapshot, buffers = None, {}
    for event in json.loads(json.dumps(events)):
        typed = MESSAGE_EVENT.validate_python(event)
        snapshot = accumulate_event(event=typed, current_snapshot=snapshot, json_bufs=buffers)
    assert snapshot is not None
    added_up, whole = (
        Message.model_validate(each).model_dump(exclude_none=True) for each in (snapshot.to_dict(), builder.answer)
    )
    assert added_up == whole
    texts, calls, rest = answer
    assert "".join(block["text"] for block in builder.answer["content"] if block["type"] == "text") == "".join(texts + rest)
    called = [block for block in builder.answer["content"] if block["type"] == "tool_use"]
    assert [(block["name"], block["input"]) for block in called] == [
        (name, {"x": "".join(pieces)} if pieces else {}) for name, pieces in calls
    ]
    assert builder.answer["stop_reason"] == {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]


def of_message(**fields: Any) -> list[dict[str, Any]]:
    return messages(MessagesRequest(model="m", max_tokens=5, **fields))


def messages(request: MessagesRequest) -> list[dict[str, Any]]:
    return request._fields()["messages"]


def test_a_conversation_with_tools_becomes_a_chat() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    expected: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
    ]  # fmt: skip
    response = ResponsesRequest(model="m", instructions="Be brief.", input=[
        {"role": "user", "content": [{"type": "input_text", "text": "Go"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}', "id": "fc_1", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "7"},
    ])  # fmt: skip
    assert [{"role": "system", "content": "Be brief."}, *response.messages([])] == expected
    said = of_message(system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], messages=[
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
        ]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "7"}]}]},
    ])  # fmt: skip
    assert said == expected


def test_text_beside_calls_and_results_stays_in_order() -> None:
    said = of_message(messages=[
        {"role": "assistant", "content": [{"type": "text", "text": "Look"}, {"type": "tool_use", "id": "c", "name": "f"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}, {"type": "text", "text": "And?"}]},
        {"role": "assistant", "content": []},
    ])  # fmt: skip
    assert [(m["role"], m["content"]) for m in said] == [
        ("assistant", "Look"), ("tool", ""), ("user", "And?"), ("assistant", "")
    ]  # fmt: skip
    items = [
        {"role": "assistant", "content": "Look"}, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "d", "name": "f", "arguments": "{}"},
    ]  # fmt: skip
    (one,) = ResponsesRequest(model="m", input=items).messages([])
    assert (one["content"], [call["id"] for call in one["tool_calls"]]) == ("Look", ["c", "d"])


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([3], "input[0]"), ([{}], "input[0].type"), ([{"type": "item_reference", "id": "x"}], "input[0].type"),
        ([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0]"),
        ([{"role": "user"}], "input[0].content"), ([{"type": "function_call", "name": "f"}], "input[0].arguments"),
        ([{"role": 1, "content": ""}], "input[0].role"), ([{"type": "function_call_output", "output": ""}], "input[0].call_id"),
    ],
)  # fmt: skip
def test_items_that_cannot_be_are_named(items: Any, param: str) -> None:
    with pytest.raises(RequestError) as error:
        ResponsesRequest(model="m", input=items).messages([])
    assert error.value.param == param


USER = [{"role": "user", "content": ""}]


def blocks(role: str, *content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": list(content)}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": blocks("user", {"type": "image"})}, "messages[0].content[0].type"),
        ({"messages": blocks("user", {"type": "tool_use"})}, "messages[0].content[0].type"),
        ({"messages": blocks("user", {"type": "tool_result"})}, "messages[0].content[0].tool_use_id"),
        ({"messages": blocks("user", 3)}, "messages[0].content[0].type"),
        ({"messages": blocks("user", {"type": "text"}), "system": 3}, "system"),
        ({"messages": USER, "tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"messages": USER, "tools": [{"name": "f"}], "tool_choice": {"type": "x"}}, "tool_choice.type"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises((RequestError, ValueError)) as error:
        of_message(**fields)
    assert getattr(error.value, "param", "system") == param


def names(events: Iterable[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_events_come_in_the_documented_order() -> None:
    builder = ResponseBuilder("resp_1", 5, "m", {})
    answer = (["a", "b"], [("f", ["x"])], [])
    assert names([*builder.begin(USAGE), *feed(builder, answer), *builder.end("stop", None, USAGE)]) == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done", "completed",
    ]  # fmt: skip
    message = MessageBuilder("msg_1", "m")
    start = ["content_block_start", "content_block_delta"]
    assert names([*message.begin(USAGE), *feed(message, answer), *message.end("stop", None, USAGE)]) == [
        "message_start", *start, "content_block_delta", "content_block_stop",
        *start, "content_block_delta", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
