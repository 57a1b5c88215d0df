"""Anthropic's client, which speaks the Messages API."""

import shared
from anthropic import Anthropic, BadRequestError

client = Anthropic(base_url=shared.URL.removesuffix("/v1"), api_key="unused", max_retries=0)
greedy = {"model": shared.MODEL, "extra_body": {"temperature": 0}}
ask = {**greedy, "messages": shared.MESSAGES, "max_tokens": shared.LIMIT}
asked = [{"role": "user", "content": shared.ASKED}]
tool = {"name": "get_weather", "description": "The weather of a city.", "input_schema": shared.CITY}
choice = {"type": "any" if shared.CALLS == "required" else shared.CALLS, "disable_parallel_tool_use": True}
call = {**greedy, "messages": asked, "max_tokens": 80, "tools": [tool], "tool_choice": choice}


@shared.feature("chat")
def chat() -> None:
    shared.same(client.messages.create(**ask).content[0].text)


@shared.feature("stream")
def stream() -> None:
    with client.messages.stream(**ask) as events:
        shared.same(shared.in_pieces(list(events.text_stream)))


@shared.feature("usage")
def usage() -> None:
    used = client.messages.create(**ask).usage
    prompt_tokens = used.input_tokens + (used.cache_read_input_tokens or 0)
    shared.counted(prompt_tokens, used.output_tokens)
    assert client.messages.count_tokens(model=shared.MODEL, messages=shared.MESSAGES).input_tokens == prompt_tokens


@shared.feature("tools")
def tools() -> None:
    (called,) = client.messages.create(**call).content
    shared.a_call(called.name, called.input)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    with client.messages.stream(**call) as events:
        shared.in_pieces([event.partial_json for event in events if event.type == "input_json"])
        (called,) = events.get_final_message().content
    shared.a_call(called.name, called.input)


@shared.feature("tool loop")
def tool_loop() -> None:
    message = client.messages.create(**call)
    result = shared.get_weather(**message.content[0].input)
    given = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": message.content[0].id, "content": result}]}
    turns = [*asked, {"role": "assistant", "content": message.content}, given]
    shared.looped(client.messages.create(**{**call, "messages": turns, "tool_choice": {"type": "none"}}).content[0].text)


@shared.feature("overflow error")
def overflow() -> None:
    turns = [{"role": "user", "content": shared.TOO_LONG}]
    error = shared.raised(BadRequestError, lambda: client.messages.create(**{**ask, "messages": turns}))
    assert "maximum context length" in error.message


shared.run()
