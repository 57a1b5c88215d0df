"""Calls of tools from the real server with the default model, through the real client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from solutions.benchmarks.servers import as_flags, running_server
from solutions.tests.real_server import MODEL, SETTINGS

pytestmark = pytest.mark.slow
pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 12},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}}
SCHEMAS = {"get_weather": WEATHER, "now": NOTHING}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": NOTHING, "strict": True}},
]
QUESTION: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
LIKE_A_CALL = '{"name": "'
Call = tuple[str, str]
Answer = tuple[str | None, list[Call], str | None]


@pytest.fixture(scope="module")
def ask(client: openai.OpenAI) -> Callable[..., Any]:
    def send(**fields: Any) -> Any:
        asked = {"model": MODEL, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
        return client.chat.completions.create(**asked | fields)

    return send


def whole(completion: Any) -> list[Answer]:
    """Of each choice: what it says, its calls, why it ended."""
    found = []
    for choice in completion.choices:
        calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
        ids = [call.id for call in choice.message.tool_calls or ()]
        assert len({*ids}) == len(ids)
        found.append((choice.message.content, calls, choice.finish_reason))
    return found


def streamed(chunks: Any, n: int = 1) -> tuple[list[Answer], int]:
    """The same of a stream, by adding up as OpenAI's documentation says; and how many pieces the arguments came in."""
    says: list[str | None] = [None] * n
    calls: list[dict[int, list[str]]] = [{} for _ in range(n)]
    reasons: list[str | None] = [None] * n
    pieces = 0
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content is not None:
                says[choice.index] = (says[choice.index] or "") + choice.delta.content
            for call in choice.delta.tool_calls or ():
                if call.index not in calls[choice.index]:
                    assert call.id
                    assert call.type == "function"
                    calls[choice.index][call.index] = [call.function.name, ""]
                else:
                    assert (call.id, call.type, call.function.name) == (None, None, None)
                pieces += bool(call.function.arguments)
                calls[choice.index][call.index][1] += call.function.arguments
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    listed = [[(name, arguments) for name, arguments in each.values()] for each in calls]
    return list(zip(says, listed, reasons, strict=True)), pieces


def check(calls: list[Call]) -> None:
    """By readers that know nothing of this engine."""
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": NAMED},
        {"tool_choice": "required", "parallel_tool_calls": False},
        {"tool_choice": "required", "n": 3, "temperature": 1.3, "seed": 5},
        {"tool_choice": "required", "stop": ["city", '"', "{", "\n"]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": TOOLS[:1]}}},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tool_choice": "required", "logprobs": True},
    ],
    ids=["required", "named", "one at a time", "n", "stop", "allowed", "with a form", "log-probabilities"],
)
def test_calls_that_have_to_be(ask: Callable[..., Any], fields: dict[str, Any]) -> None:
    got = whole(ask(**fields))
    for content, calls, reason in got:
        assert content is None
        assert reason == "tool_calls"
        assert calls
        check(calls)
        if fields.get("tool_choice") == NAMED:
            assert [name for name, _ in calls] == ["get_weather"]
        if "allowed" in str(fields):
            assert {name for name, _ in calls} == {"get_weather"}
        if "parallel_tool_calls" in fields:
            assert len(calls) == 1
    again, pieces = streamed(ask(**fields, stream=True), fields.get("n", 1))
    assert again == got
    assert pieces >= sum(len(calls) for _, calls, _ in got)


def test_arguments_come_in_pieces(ask: Callable[..., Any]) -> None:
    ((_, calls, _),), pieces = streamed(ask(tool_choice=NAMED, stream=True))
    assert len(calls) == 1
    assert pieces > 5


def test_auto_lets_the_model_speak(ask: Callable[..., Any]) -> None:
    (content, calls, reason), *_ = whole(ask())
    assert content
    assert calls == []
    assert reason == "stop"
    assert streamed(ask(stream=True))[0] == [(content, calls, reason)]
    ((content, calls, _),) = whole(ask(tool_choice="none", max_tokens=20))
    assert content
    assert calls == []


def called(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(call_id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize("stop", [None, ["unit", "}", "city"], ["\n"]])
def test_auto_holds_a_call_from_its_beginning(ask: Callable[..., Any], stop: list[str] | None) -> None:
    """The model imitates an earlier turn. Stop strings end texts, never a call, which they are all in."""
    earlier = called("a", "get_weather", '{"city": "Rome", "unit": "celsius"}')
    history = [
        {"role": "user", "content": "What is the weather in Rome?"}, {"role": "assistant", "tool_calls": [earlier]},
        result("a", "sunny"), {"role": "assistant", "content": "It is sunny in Rome."}, *QUESTION,
    ]  # fmt: skip
    ((content, calls, reason),) = got = whole(ask(messages=history, tool_choice="auto", stop=stop))
    assert (content, reason) == (None, "tool_calls")
    assert calls
    check(calls)
    assert streamed(ask(messages=history, stop=stop, stream=True))[0] == got
    several = whole(ask(messages=history, stop=stop, n=4, temperature=1, seed=1))
    for content, calls, reason in several:
        check(calls if reason == "tool_calls" else calls[:-1])
        assert calls or content is not None
    assert streamed(ask(messages=history, stop=stop, n=4, temperature=1, seed=1, stream=True), 4)[0] == [
        (content or None, calls, reason) for content, calls, reason in several
    ]


@pytest.mark.parametrize("limit", [1, 8, 12, 16, 24])
def test_a_call_that_is_cut_says_so(ask: Callable[..., Any], limit: int) -> None:
    full = whole(ask(tool_choice=NAMED))[0][1][0]
    (content, calls, reason), *_ = got = whole(ask(tool_choice=NAMED, max_tokens=limit))
    assert reason == ("length" if calls != [full] else "tool_calls")
    assert streamed(ask(tool_choice=NAMED, max_tokens=limit, stream=True))[0] == got
    assert all(name == full[0] and full[1].startswith(arguments) for name, arguments in calls)
    assert calls or LIKE_A_CALL.startswith(content[: len(LIKE_A_CALL)])


def test_ask_call_result_answer(ask: Callable[..., Any], client: openai.OpenAI) -> None:
    """The loop of every agent, with two calls at once, plain and streamed."""
    for stream in (False, True):
        messages = [*QUESTION]
        with client.chat.completions.stream(
            model=MODEL, messages=messages, tools=TOOLS, tool_choice="required", temperature=0, max_tokens=120
        ) as events:
            message = events.get_final_completion().choices[0].message
        assert message.tool_calls
        messages.append(message.model_dump(exclude_none=True))
        for call in messages[-1]["tool_calls"]:
            check([(call["function"]["name"], call["function"]["arguments"])])
            messages.append(result(call["id"], '{"temperature": 21}'))
        answer = ask(messages=messages, tool_choice="none", stream=stream, max_tokens=20)
        text = streamed(answer)[0][0][0] if stream else answer.choices[0].message.content
        assert text


def test_the_model_is_told_of_functions_calls_and_results(ask: Callable[..., Any], tokenizer: Any) -> None:
    """By the length of the prompt: the same conversation in words, as the documentation shows it, has as many tokens."""
    none = NOTHING | {"additionalProperties": False}
    rules = (
        "You can call functions. To call one, answer with nothing but the call, in this form:\n"
        '{"name": "name_of_the_function", "arguments": {"name_of_an_argument": "value"}}\n'
        "You get the result, and then answer. If no function is of use, answer without a call.\n"
        "These are the functions, with the JSON schemas of their arguments:\n"
        + "\n".join(map(json.dumps, [TOOLS[0]["function"], {"name": "now", "parameters": none}]))
    )
    call = '{"name": "get_weather", "arguments": {"city": "Rome", "unit": "celsius"}}'
    arguments = json.dumps(json.loads(call)["arguments"])
    given = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [called("a", "get_weather", arguments)]},
        result("a", "sunny"),
        {"role": "user", "content": "And Paris?"},
    ]  # fmt: skip
    in_words = [
        {"role": "system", "content": f"Be brief.\n\n{rules}"}, {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": call}, {"role": "user", "content": "Result of get_weather: sunny\nAnd Paris?"},
    ]  # fmt: skip
    expected = len(tokenizer.apply_chat_template(in_words, add_generation_prompt=True)["input_ids"])
    assert ask(messages=given, max_tokens=1).usage.prompt_tokens == expected


def test_the_older_names(ask: Callable[..., Any]) -> None:
    functions = [tool["function"] for tool in TOOLS]
    asked = {"tools": openai.omit, "functions": functions, "function_call": {"name": "get_weather"}}
    choice = ask(**asked).choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    check([(choice.message.function_call.name, choice.message.function_call.arguments)])
    name, arguments = "", ""
    for chunk in ask(**asked, stream=True):
        if (part := chunk.choices[0].delta.function_call) is not None:
            name, arguments = name + (part.name or ""), arguments + part.arguments
    assert (name, arguments) == (choice.message.function_call.name, choice.message.function_call.arguments)
    told = [
        *QUESTION, {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": arguments}},
        {"role": "function", "name": name, "content": "21 degrees"},
    ]  # fmt: skip
    assert ask(**asked | {"function_call": "none"}, messages=told).choices[0].message.content


def test_an_answer_with_tools_may_have_a_form(ask: Callable[..., Any]) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    ((content, calls, _),) = got = whole(ask(response_format=form))
    assert bool(content) != bool(calls)
    check(calls)
    if content:
        jsonschema.validate(json.loads(content), schema)
    assert streamed(ask(response_format=form, stream=True))[0] == got


def test_speculation_changes_no_call() -> None:
    speculative = json.dumps({"method": "ngram", "num_speculative_tokens": 4})
    with (
        running_server(*as_flags(SETTINGS | {"speculative_config": speculative})) as (_, url),
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as fast,
    ):
        asked: Any = {"model": MODEL, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
        got = whole(fast.chat.completions.create(**asked, tool_choice="required", n=2))
        assert streamed(fast.chat.completions.create(**asked, tool_choice="required", n=2, stream=True), 2)[0] == got
        for _, calls, reason in got:
            assert reason == "tool_calls"
            check(calls)


def test_without_auto_only_what_is_asked_for() -> None:
    with (
        running_server(*as_flags(SETTINGS), "--no-enable-auto-tool-choice") as (_, url),
        openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client,
    ):
        asked: Any = {"model": MODEL, "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_tokens": 60}
        for fields in ({}, {"tool_choice": "auto"}):
            with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
                client.chat.completions.create(**asked, **fields)
        assert client.chat.completions.create(**asked, tool_choice=NAMED).choices[0].message.tool_calls
        assert client.chat.completions.create(**asked, tool_choice="none").choices[0].message.content
        assert httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
