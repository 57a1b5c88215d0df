"""The server in a process of its own with the default model, driven by the real `openai` client.

What needs a fault or exact timing has its tests in test_api_faults.py.
"""

from __future__ import annotations

import json
import re
import time
from typing import Annotated, Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from solutions.tests.real_server import CHAT, CONTEXT, GREEDY, MODEL


def usage_of(answer: Any) -> tuple[int, int, int]:
    usage = answer.usage
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# ------------------------------------------------------------------------------------------------------ completions


def test_completion(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(**GREEDY, prompt=prompt, max_tokens=8)
    choice = answer.choices[0]
    assert (answer.object, answer.model, choice.index, choice.finish_reason) == ("text_completion", MODEL, 0, "length")
    assert "Paris" in choice.text
    assert answer.id.startswith("cmpl-")
    assert abs(answer.created - time.time()) < 60
    count = len(tokenizer.encode(prompt))
    assert usage_of(answer) == (count, 8, count + 8)
    default = client.completions.create(**GREEDY, prompt=prompt)
    assert default.usage.completion_tokens == 16  # OpenAI's default of max_tokens
    assert default.choices[0].text.startswith(choice.text)


def test_the_four_forms_of_a_prompt(client: openai.OpenAI, tokenizer: Any) -> None:
    texts = ["One, two, three,", "The sky is"]
    ids = [tokenizer.encode(text) for text in texts]

    def complete(prompt: Any) -> list[str]:
        answer = client.completions.create(**GREEDY, prompt=prompt, max_tokens=6)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    single = complete(texts[0]) + complete(texts[1])
    assert single[0] != single[1]
    assert complete(ids[1]) == single[1:]
    assert complete(texts) == single
    assert complete(ids) == single


def test_choices_of_several_prompts_with_n(client: openai.OpenAI, tokenizer: Any) -> None:
    prompts = ["A", "The quick brown fox jumps over"]
    # top_p keeps out the tail, where thousands of tokens are so unlikely that rounding decides between neighbours.
    answer = client.completions.create(model=MODEL, prompt=prompts, n=3, max_tokens=8, seed=1, top_p=0.8)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(texts)) == 6
    prompt_tokens = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert answer.usage.prompt_tokens == prompt_tokens  # each prompt once
    for i, prompt in enumerate(prompts):  # prompt i, sample j is choice i * n + j
        alone = client.completions.create(model=MODEL, prompt=prompt, n=3, max_tokens=8, seed=1, top_p=0.8)
        assert [choice.text for choice in alone.choices] == texts[3 * i : 3 * i + 3]


def test_seed_fixes_the_sample(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        return client.completions.create(model=MODEL, prompt="Once", max_tokens=5, seed=seed).choices[0].text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in (7, 8, 2**63 - 1, -(2**63))}) == 4


def test_stop_string_and_stop_token(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = "Count: 1, 2, 3, 4, 5, 6,"
    full = client.completions.create(**GREEDY, prompt=prompt, max_tokens=20).choices[0].text
    stop = full[5:8]
    end = full.index(stop)
    stopped = client.completions.create(**GREEDY, prompt=prompt, max_tokens=20, stop=["not in it", stop]).choices[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (full[:end], "stop", stop)
    kept = client.completions.create(
        **GREEDY, prompt=prompt, max_tokens=20, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == full[: end + len(stop)]
    comma = tokenizer.encode(",")[0]
    by_token = client.completions.create(**GREEDY, prompt=prompt, extra_body={"stop_token_ids": [comma]}).choices[0]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", comma)
    assert by_token.text == full[: full.index(",")]


def test_sampling_fields_have_their_effect(client: openai.OpenAI, tokenizer: Any) -> None:
    def complete(prompt: str = "The sky is", **fields: Any) -> Any:
        # the client checks its own names of fields; extra_body takes any
        extra = {"temperature": 0, "max_tokens": 5} | fields
        return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra).choices[0]

    greedy = complete().text
    assert complete(temperature=5, top_k=1).text == greedy
    assert complete(temperature=5, min_p=1.0).text == greedy
    assert complete(temperature=5, top_p=1e-6).text == greedy
    assert complete(temperature=5, seed=0).text != greedy
    purple = {str(tokenizer.encode(" purple")[0]): 100}
    assert complete(logit_bias=purple).text == " purple" * 5
    for penalty in ({"repetition_penalty": 5.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert complete("a b a b a b a b").text != complete("a b a b a b a b", **penalty).text
    end = {str(tokenizer.eos_token_id): 100}
    assert complete(logit_bias=end).finish_reason == "stop"
    assert complete(logit_bias=end, ignore_eos=True).finish_reason == "length"
    assert complete(logit_bias=end, ignore_eos=True).text == ""
    shown = complete(logit_bias=end, ignore_eos=True, skip_special_tokens=False)
    assert shown.text == tokenizer.eos_token * 5
    late = client.completions.create(**GREEDY, prompt="Hi", logit_bias=end, extra_body={"min_tokens": 3})
    assert late.usage.completion_tokens == 4


def test_echo(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = "The sky is"
    plain = client.completions.create(**GREEDY, prompt=prompt, max_tokens=4).choices[0].text
    for form in (prompt, tokenizer.encode(prompt)):
        assert client.completions.create(**GREEDY, prompt=form, max_tokens=4, echo=True).choices[0].text == prompt + plain
        chunks = client.completions.create(**GREEDY, prompt=form, max_tokens=4, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == prompt + plain


def test_completion_logprobs(client: openai.OpenAI) -> None:
    fields = {**GREEDY, "prompt": "Once upon a", "max_tokens": 6, "logprobs": 3}
    choice = client.completions.create(**fields).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert top[token] == logprob == max(top.values()) <= 0
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**fields, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [item for part in streamed if part for item in getattr(part, name)] == getattr(logprobs, name)


@pytest.mark.parametrize("fields", [{}, {"stop": [" the"]}, {"n": 3, "seed": 3, "temperature": 1.0}, {"prompt": ["A", "B"]}])
def test_streamed_text_equals_whole_text(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    request = {**GREEDY, "prompt": "A story about 😀 and 日本:", "max_tokens": 12, **fields}
    whole = client.completions.create(**request)
    texts, reasons, usages = {}, {}, []
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usages.append((chunk.usage, len(chunk.choices)))
        for choice in chunk.choices:
            assert choice.index not in reasons  # nothing after the end
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [usage for usage, _ in usages[:-1] if usage] == []
    usage, num_choices = usages[-1]
    assert num_choices == 0
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == usage_of(whole)


def test_cached_prompt_tokens_are_reported_and_a_salt_hides_them(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        answer = client.completions.create(**GREEDY, prompt="word " * 100, max_tokens=1, extra_body={"cache_salt": salt})
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached("mine"), cached("other")] == [0, 0]
    assert cached("mine") >= 64


# ------------------------------------------------------------------------------------------------------------- chat


def test_chat_follows_the_template(client: openai.OpenAI, tokenizer: Any) -> None:
    answer = client.chat.completions.create(**GREEDY, messages=CHAT, max_completion_tokens=12)
    message = answer.choices[0].message
    assert (answer.object, message.role, answer.choices[0].finish_reason) == ("chat.completion", "assistant", "length")
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    same = client.completions.create(**GREEDY, prompt=prompt, max_tokens=12)
    assert message.content == same.choices[0].text != ""
    assert usage_of(answer) == usage_of(same)
    again = [*CHAT, message.model_dump(), {"role": "user", "content": "More."}]  # what clients send back
    assert client.chat.completions.create(**GREEDY, messages=again, max_tokens=3).choices[0].message.content


def test_chat_without_a_limit_ends_by_itself(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    answer = client.chat.completions.create(**GREEDY, messages=messages)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content
    assert answer.usage.completion_tokens > 1


def test_content_parts_are_joined_by_line_breaks(client: openai.OpenAI) -> None:
    def prompt_tokens_and_text(content: Any) -> tuple[int, str]:
        messages = [{"role": "user", "content": content}]
        answer = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=6)
        return answer.usage.prompt_tokens, answer.choices[0].message.content

    parts = [{"type": "text", "text": "Name a"}, {"type": "text", "text": "colour"}]
    assert prompt_tokens_and_text(parts) == prompt_tokens_and_text("Name a\ncolour")


def test_chat_stream(client: openai.OpenAI) -> None:
    request = {"model": MODEL, "messages": CHAT, "n": 2, "seed": 5, "max_tokens": 6}
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    first, texts = set(), {0: "", 1: ""}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert (choice.delta.role == "assistant") == (choice.index not in first)  # the first chunk, and only it
        first.add(choice.index)
        texts[choice.index] += choice.delta.content
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert chunks[-1].choices == []
    assert usage_of(chunks[-1]) == usage_of(whole)
    assert whole.usage.prompt_tokens == client.chat.completions.create(**{**request, "n": 1}).usage.prompt_tokens


def test_chat_logprobs(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Repeat after me: 😀🦜"}]
    fields = {**GREEDY, "messages": messages, "max_tokens": 9, "logprobs": True}
    choice = client.chat.completions.create(**fields, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert len(content) == 9
    raw = b"".join(bytes(entry.bytes) for entry in content)  # a token may hold a part of a character
    assert raw.decode(errors="ignore").startswith(choice.message.content.rstrip("\ufffd"))
    for entry in content:
        assert entry.top_logprobs[0].token == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted([t.logprob for t in entry.top_logprobs], reverse=True)
        assert len(entry.top_logprobs) == 2
    streamed = client.chat.completions.create(**fields, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed]
    entries = [entry for part in parts if part for entry in part.content]
    assert [(e.token, e.bytes) for e in entries] == [(e.token, e.bytes) for e in content]
    assert {len(entry.top_logprobs) for entry in entries} == {0}


def test_the_stream_on_the_wire(url: str) -> None:
    body = {**GREEDY, "messages": CHAT, "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    events = text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":null' in events[0]


class Person(BaseModel):
    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_after_a_schema_are_parsed_by_pydantic(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": Person.model_json_schema(), "strict": True}}
    for seed in range(3):
        request = {"model": MODEL, "messages": CHAT, "seed": seed, "max_tokens": 80, "response_format": schema}
        if stream:
            chunks = client.chat.completions.create(**request, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        else:
            text = client.chat.completions.create(**request).choices[0].message.content
        assert 0 <= Person.model_validate_json(text).age <= 120


def test_the_client_parses_a_model_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Person, max_tokens=80, seed=0)
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_other_forms(client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> str:
        return (
            client.completions.create(model=MODEL, prompt="An answer:", max_tokens=40, seed=0, extra_body=fields)
            .choices[0]
            .text
        )

    assert ask(response_format={"type": "json_object"}).startswith("{")  # it may be long; whole ones are read elsewhere
    assert json.loads(ask(guided_json={"enum": [1, "two"]})) in (1, "two")
    assert json.loads(ask(guided_json='{"type": "boolean"}')) in (True, False)
    assert re.fullmatch(r"\d{4}", ask(guided_regex=r"\d{4}"))
    assert ask(guided_choice=["yes", "no"]) in ("yes", "no")
    assert ask(guided_grammar='root ::= "a" ("b" | "c")') in ("ab", "ac")
    assert ask(response_format={"type": "text"})


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object, model.max_model_len) for model in models] == [(MODEL, "model", CONTEXT)]
    assert client.models.retrieve(MODEL).id == MODEL


# ----------------------------------------------------------------------------------------------------- bad requests

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
    ({"echo": True, "logprobs": 1}, "echo"),
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
    ({"best_of": 2}, "best_of"),
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
