"""What the server refuses, and that it goes on: each bad request is one clear error that names the field.

Driven by the real `openai` client against the server in a process of its own with the default model.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from solutions.tests.real_server import CONTEXT, GREEDY, MODEL

JSON = {"Content-Type": "application/json"}
START = f'{{"model": "{MODEL}", "prompt": "Hi", '.encode()
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
    ({"suffix": "end"}, "suffix"),
    ({"mirostat": 2}, "mirostat"),
    ({"messages": HI}, "messages"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 1000}, "best_of"),
    ({"guided_json": 5}, "guided_json"),
    ({"top_k": 10**400}, None),
    ({"prompt": "half of \ud83d"}, "prompt"),
    ({"prompt": ["good", "\udc00"]}, "prompt[1]"),
    ({"stop": ["a", "\ud800"]}, "stop[1]"),
    ({"cache_salt": "\ud800"}, "cache_salt"),
    ({"user": "\ud800"}, "user"),
    ({"guided_choice": ["\ud800"]}, "guided_choice[0]"),
    ({"guided_regex": "\ud800"}, "guided_regex"),
    ({"guided_grammar": "\ud800"}, "guided_grammar"),
    ({"guided_json": {"const": "\ud800"}}, "guided_json.const"),
    ({"guided_json": {"properties": {"\ud800": {}}}}, "guided_json.properties.\\ud800"),
    ({"\ud800": 1}, "\\ud800"),
]
F: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


def tools(**fields: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "f"} | fields}]}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def called(*ids: str, arguments: str = "{}") -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": each, **call} for each in ids]}


def result(call_id: str) -> dict[str, Any]:
    return {"role": "tool", "content": "x", "tool_call_id": call_id}


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "a b", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [*HI, {"role": "user", "content": None}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "word " * CONTEXT}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"prompt": "x"}, "prompt"),
    ({"echo": 1}, "echo"),
    ({"reasoning_effort": "furious"}, "reasoning_effort"),
    ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call"),
    *(({"tools": [F], "tool_choice": choice}, "tool_choice") for choice in ("any", {"type": "function"}, named("g"), 5)),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
    *((tools(name=name), "tools[0].function.name") for name in ("", "a b", "é", "x" * 65, "f.g", "f\n")),
    (tools(parameters=[]), "tools[0].function.parameters"),
    (tools(parameters={"type": "array"}), "tools[0].function.parameters"),
    (tools(parameters={"type": "object", "properties": {"a": {"type": 5}}}), "tools[0].function.parameters"),
    (tools(strict=1), "tools[0].function.strict"),
    ({"tools": [F, F]}, "tools"),
    ({"tools": [F], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"tools": [F], "guided_regex": "a"}, "guided_regex"),
    ({"tools": [F], "tool_choice": "required", "min_tokens": 2}, "min_tokens"),
    ({"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[1].tool_call_id"),
    ({"messages": [*HI, called("a")]}, "messages[1]"),
    ({"messages": [*HI, called("a"), *HI]}, "messages[1]"),
    ({"messages": [*HI, called("a"), result("b")]}, "messages[2].tool_call_id"),
    ({"messages": [*HI, called("a", "b"), result("a"), *HI]}, "messages[2]"),
    ({"messages": [*HI, called("a"), result("a"), result("a")]}, "messages[3].tool_call_id"),
    ({"messages": [*HI, called("a", "a"), result("a")]}, "messages[1].tool_calls[1].id"),
    ({"messages": [*HI, called("a", arguments="[]"), result("a")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [*HI, called("a", arguments="{"), result("a")]}, "messages[1].tool_calls[0].function.arguments"),
    ({"messages": [*HI, called("a") | {"role": "user", "content": "x"}, result("a")]}, "messages[1].tool_calls"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": None, "json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": "x"}}, "structured_outputs.json"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": 'start: "a" | other'}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"grammar": "?start: x\n%import common.INT"}}, "structured_outputs.grammar"),
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"response_format": {"type": "text", "format": {"type": "any_text"}}}, "response_format"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"guided_regex": "(("}, "guided_regex"),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "root ::= nope"}, "guided_grammar"),
    ({"guided_json": {"type": 5}}, "guided_json"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"messages": [{"role": "assistant", "audio": {"id": "x"}}]}, "messages[0].audio"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud83d"}]}]}, "messages[0].content[0].text"),
    ({"messages": [*HI, {"role": "assistant", "content": 5}]}, "messages[1].content"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "\ud800"}}}},
        "response_format.json_schema.schema.const",
    ),
]
CODES = {
    "invalid_function_parameters", "invalid_type", "invalid_value", "missing_required_parameter", "unknown_parameter",
    "unsupported_parameter",
}  # fmt: skip
"""OpenAI's words for what is wrong with a field."""


def assert_serves(client: openai.OpenAI) -> None:
    """The engine goes on serving others."""
    assert client.completions.create(**GREEDY, prompt="Hi", max_tokens=1).choices[0].finish_reason == "length"


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> Any:
    """Send a body as it is: the client's own writer of JSON has no halves of characters."""
    return client.post(path, cast_to=object, content=json.dumps(body).encode(), options={"headers": JSON})


def assert_refused(error: openai.APIStatusError, status: int, param: str | None) -> None:
    message = error.body["message"]
    too_long = message.startswith(f"This model's maximum context length is {CONTEXT} tokens. However, you")
    assert error.status_code == status
    words = {"context_length_exceeded"} if too_long else {"model_not_found"} if status == 404 else CODES if param else {status}
    assert error.body["code"] in words
    assert error.param == param
    assert "\n" not in message
    assert "/" not in message.replace("/v1/", "")  # no paths
    assert param is None or param.split("[")[0] in message or param in ("prompt", "messages")


@pytest.mark.slow
@pytest.mark.parametrize(("fields", "param"), BAD_COMPLETIONS)
def test_a_bad_completion_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "prompt": "Hi", **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        post(client, "/completions", body)
    assert_refused(caught.value, 400, param)
    assert_serves(client)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            {"properties": {"a": {"items": {}, "uniqueItems": True, "minItems": 2}}},
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


@pytest.mark.parametrize(("fields", "param"), BAD_CHATS, ids=[f"{param}-{index}" for index, (_, param) in enumerate(BAD_CHATS)])
def test_a_bad_chat_request_is_refused_by_name(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": HI, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        post(client, "/chat/completions", body)
    assert_refused(caught.value, 400, param)
    assert_serves(client)


def test_a_request_that_does_not_fit_says_so_in_openais_words(client: openai.OpenAI, tokenizer: Any) -> None:
    """The first sentence is what LiteLLM searches for, the code what LangChain does; the numbers are the tokenizer's."""
    text = "word " * CONTEXT
    in_prompt = len(tokenizer.encode(text))
    in_chat = len(tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"])
    in_hi = len(tokenizer.apply_chat_template(HI, add_generation_prompt=True)["input_ids"])
    start = f"This model's maximum context length is {CONTEXT} tokens. However, "
    for path, fields, said in (
        ("/completions", {"prompt": text}, f"your prompt resulted in {in_prompt} tokens"),
        ("/completions", {"prompt": [[7], [7] * CONTEXT]}, f"your prompt resulted in {CONTEXT} tokens"),
        ("/completions", {"prompt": [7] * 12, "max_tokens": CONTEXT - 11},
         f"you requested {CONTEXT + 1} tokens (12 in the prompt, {CONTEXT - 11} in the completion)"),
        ("/chat/completions", {"messages": [{"role": "user", "content": text}]}, f"your messages resulted in {in_chat} tokens"),
        ("/chat/completions", {"messages": HI, "max_completion_tokens": CONTEXT},
         f"you requested {CONTEXT + in_hi} tokens ({in_hi} in the messages, {CONTEXT} in the completion)"),
    ):  # fmt: skip
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as caught:
                post(client, path, {"model": MODEL, "stream": stream, **fields})
            assert caught.value.code == "context_length_exceeded"
            assert "context_length_exceeded" in caught.value.body["message"]  # newer clients show no more than that
            assert caught.value.type == "invalid_request_error"
            sentence = f"{start}{said}. Please reduce the length of the {'messages' if 'chat' in path else 'prompt'}"
            assert caught.value.body["message"].startswith(sentence + (". (" if "resulted" in said else " or max_"))
    fits = client.completions.create(
        model=MODEL, prompt=[7] * 12, max_tokens=CONTEXT - 12, logit_bias={tokenizer.eos_token_id: 100}
    )
    assert fits.choices[0].finish_reason == "stop"


HINTS = {
    "metadata": {"team": "a"}, "safety_identifier": "u", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "parallel_tool_calls": False, "prediction": {"type": "content", "content": "Hello"}, "user": "u", "store": True,
    "service_tier": "flex", "verbosity": "low", "reasoning_effort": "high",
}  # fmt: skip


def test_hints_that_change_no_answer_are_accepted(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "messages": HI, "max_tokens": 4}
    plain = client.chat.completions.create(**asked).choices[0].message.content
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    hinted = [{"role": "user", "name": "Ann", "content": [part]}]
    raw = client.chat.completions.with_raw_response.create(**{**asked, "messages": hinted}, extra_body=HINTS)
    assert raw.parse().choices[0].message.content == plain
    assert "x-ignored-fields" not in raw.headers


def test_a_developer_is_the_system_and_a_role_of_ones_own_reaches_the_template(client: openai.OpenAI, tokenizer: Any) -> None:
    def tokens(*messages: dict[str, str]) -> int:
        return client.chat.completions.create(**GREEDY, messages=messages, max_tokens=1).usage.prompt_tokens

    rule, critic = {"role": "system", "content": "Be brief."}, {"role": "critic", "content": "Too long."}
    assert tokens({**rule, "role": "developer"}, *HI) == tokens(rule, *HI)
    assert tokens(*HI, critic) == len(tokenizer.apply_chat_template([*HI, critic], add_generation_prompt=True)["input_ids"])


def test_null_is_not_set_in_any_field(client: openai.OpenAI) -> None:
    """Clients write all the fields that they know of, of both endpoints and of other servers."""
    names = (
        "echo", "suffix", "best_of", "logprobs", "top_logprobs", "max_completion_tokens", "n", "stop", "tools", "tool_choice",
        "functions", "prompt_logprobs", "truncate_prompt_tokens", "chat_template", "add_generation_prompt", "stream_options",
        "guided_json", "response_format", "reasoning_effort", "extra_of_somebody", "store", "body", "stream", "min_tokens",
    )  # fmt: skip
    nulls = dict.fromkeys(names)
    assert post(client, "/completions", {"model": MODEL, "prompt": "Hi", "messages": None, "max_tokens": 2, **nulls})["choices"]
    messages = [
        {"role": "system", "content": "Be brief.", "name": None}, {"role": "user", "content": "Hi", "tool_calls": None},
        {"role": "assistant", "content": None, "refusal": None, "audio": None},
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": None, "mine": None}], "mine": None},
    ]  # fmt: skip
    chat = {"model": MODEL, "messages": messages, "prompt": None, "max_tokens": 2, **nulls}
    assert post(client, "/chat/completions", chat)["choices"]
    schema = {"name": "x", "description": None, "strict": None, "mine": None, "schema": {"const": None}}
    formed = chat | {"response_format": {"type": "json_schema", "json_schema": schema}}
    answer = post(client, "/chat/completions", formed | {"max_tokens": 8})["choices"][0]["message"]["content"]
    assert answer == "null"  # in a schema, null is a value
    root = str(client.base_url).removesuffix("/v1/")
    tokens = httpx.post(f"{root}/tokenize", json={"prompt": "Hi", "messages": None, "add_special_tokens": None, "x": None})
    assert tokens.json()["count"] == 1


def test_an_assistant_may_have_said_nothing(client: openai.OpenAI, tokenizer: Any) -> None:
    turns = [*HI, {"role": "assistant", "content": None}, {"role": "user", "content": "Well?"}]
    asked = {"model": MODEL, "max_tokens": 1}
    missing = [*HI, {"role": "assistant"}, {"role": "user", "content": "Well?"}]
    expected = len(
        tokenizer.apply_chat_template(
            [turn | {"content": turn["content"] or ""} for turn in turns], add_generation_prompt=True
        )["input_ids"]
    )
    for messages in (turns, missing):
        assert post(client, "/chat/completions", asked | {"messages": messages})["usage"]["prompt_tokens"] == expected


def test_what_was_refused_or_called_may_be_written_in_other_ways(client: openai.OpenAI) -> None:
    """A refusal is a text, arguments may be an object, and a tool without a type is a function."""

    def tokens(*messages: Any, **fields: Any) -> int:
        return post(client, "/chat/completions", GREEDY | {"messages": messages, "max_tokens": 1} | fields)["usage"][
            "prompt_tokens"
        ]

    said = tokens(*HI, {"role": "assistant", "content": "No."}, *HI)
    for refused in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        assert tokens(*HI, {"role": "assistant", **refused}, *HI) == said
    call = called("a", arguments='{"city": "é"}')
    asked = tokens(*HI, call, result("a"), tools=[F])
    written = json.loads(json.dumps(call))
    written["tool_calls"][0]["function"]["arguments"] = {"city": "é"}
    assert tokens(*HI, written, result("a"), tools=[{"function": F["function"]}], best_of=1) == asked


def test_asking_for_no_alternatives_is_no_demand(client: openai.OpenAI) -> None:
    answer = post(client, "/chat/completions", {"model": MODEL, "messages": HI, "max_tokens": 1, "top_logprobs": 0})
    assert answer["choices"][0]["logprobs"] is None


def test_the_best_of_one_is_streamed(client: openai.OpenAI) -> None:
    asked = {**GREEDY, "prompt": "The sky is", "max_tokens": 4}
    plain = client.completions.create(**asked).choices[0].text
    assert client.completions.create(**asked, best_of=1).choices[0].text == plain
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, best_of=1, stream=True)) == plain
    seeded = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "seed": 3, "n": 3}
    texts = [choice.text for choice in client.completions.create(**seeded).choices]
    assert [choice.text for choice in client.completions.create(**seeded, best_of=3).choices] == texts


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
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "x"}',
        START + b'"guided_json": {"a":' + b"[" * 900 + b"]" * 900 + b"}}",
        START + b'"metadata": ' + b'{"a":' * 300 + b"1" + b"}" * 301,
        START + b'"seed": ' + b"9" * 5000 + b"}",
        START + b'"user": "\xed\xa0\x80"}',
    ],
    ids=[
        "empty",
        "cut off",
        "list",
        "string",
        "not UTF-8",
        "not UTF-8 inside",
        "deep list",
        "deep object",
        "no prompt",
        "deep schema",
        "deep metadata",
        "long number",
        "surrogate in UTF-8",
    ],
)
def test_a_bad_body_is_a_400(url: str, client: openai.OpenAI, body: bytes) -> None:
    response = httpx.post(f"{url}/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "There was an error" not in response.json()["error"]["message"]  # that says nothing
    assert_serves(client)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
@pytest.mark.parametrize(
    ("field", "param"),
    [
        ('"temperature": VALUE', "temperature"),
        ('"logit_bias": {"5": VALUE}', "logit_bias.5"),
        ('"guided_json": {"type": "number", "maximum": VALUE}', "guided_json.maximum"),
        ('"guided_json": {"enum": [1, [VALUE]]}', "guided_json.enum[1][0]"),
        ('"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"minimum": VALUE}}}',
         "response_format.json_schema.schema.minimum"),
        ('"metadata": {"a": VALUE}', "metadata.a"),
    ],
)  # fmt: skip
def test_numbers_that_are_none_are_refused(url: str, client: openai.OpenAI, field: str, param: str, value: str) -> None:
    body = f'{{"model": "{MODEL}", "prompt": "Hi", {field.replace("VALUE", value)}}}'
    response = httpx.post(f"{url}/completions", content=body, headers=JSON)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert_serves(client)


@pytest.mark.slow
def test_extreme_values_harm_nobody(client: openai.OpenAI) -> None:
    extremes = [{"temperature": 1e300}, {"top_k": 10**30}, {"min_p": 1e-300}, {"top_p": 1e-300}, {"repetition_penalty": 3e38}]
    extremes += [{**a, **b} for a in extremes for b in ({"top_p": 1e-300}, {"top_k": 1000, "min_p": 1e-300})]
    for extreme in [
        *extremes,
        {"repetition_penalty": 1e-300, "temperature": 1e-5},
        {"stop": ["x" * 10_000]},
        {"n": 128, "max_tokens": 1},
    ]:
        body = {"prompt": "The sky is the sky is", "max_tokens": 3, **extreme}
        assert client.completions.create(model=MODEL, prompt="", extra_body=body).usage.completion_tokens in (3, 128)


def test_unknown_routes_and_methods_have_openai_errors(url: str) -> None:
    for method, path, status in (("GET", "/v2/x", 404), ("GET", "/completions", 405), ("DELETE", "/models", 405)):
        response = httpx.request(method, url + path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == status
