"""The server in a process of its own with the default model, driven by the real `openai` client.

What needs a fault or exact timing has its tests in test_api_faults.py.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import time
from typing import Annotated, Any

import httpx
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from solutions.tests.real_server import CHAT, CONTEXT, GREEDY, MODEL
from solutions.tests.slow_cases import slow_after


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


@pytest.mark.slow
def test_best_of_returns_the_likeliest_and_bills_all(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "Once", "max_tokens": 8, "seed": 3, "temperature": 1.5, "logprobs": 1}
    every = client.completions.create(**asked, n=6)
    per_token = {choice.text: statistics.fmean(choice.logprobs.token_logprobs) for choice in every.choices}
    best = client.completions.create(**asked, n=2, best_of=6)
    assert [choice.text for choice in best.choices] == sorted(per_token, key=per_token.get, reverse=True)[:2]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == every.usage.completion_tokens == 48
    plain = client.completions.create(**{**asked, "logprobs": None}, best_of=6)
    assert [(choice.text, choice.logprobs) for choice in plain.choices] == [(best.choices[0].text, None)]


def test_echo(client: openai.OpenAI, tokenizer: Any) -> None:
    prompt = "The sky is"
    plain = client.completions.create(**GREEDY, prompt=prompt, max_tokens=4).choices[0].text
    for form in (prompt, tokenizer.encode(prompt)):
        assert client.completions.create(**GREEDY, prompt=form, max_tokens=4, echo=True).choices[0].text == prompt + plain
        chunks = client.completions.create(**GREEDY, prompt=form, max_tokens=4, echo=True, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == prompt + plain


def test_echo_with_logprobs_scores_the_prompt(client: openai.OpenAI, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from solutions.models.loader import resolve_model

    prompt = "The capital of France is Paris"
    tokens = tokenizer.encode(prompt)
    answer = client.completions.create(**GREEDY, prompt=prompt, max_tokens=2, echo=True, logprobs=2).choices[0]
    model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL).path, dtype=torch.float32)
    with torch.inference_mode():
        reference = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    got = answer.logprobs
    assert got.token_logprobs[0] is got.top_logprobs[0] is None
    expected = [float(reference[i, token]) for i, token in enumerate(tokens[1:])]
    assert got.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=2e-3)
    assert [max(top.values()) for top in got.top_logprobs[1 : len(tokens)]] == pytest.approx(
        reference[:-1].max(-1).values.tolist(), abs=2e-3
    )
    assert "".join(got.tokens) == answer.text
    assert got.tokens[: len(tokens)] == [tokenizer.decode([token]) for token in tokens]
    assert [answer.text[a:b] for a, b in itertools.pairwise([*got.text_offset, len(answer.text)])] == got.tokens
    assert len(got.tokens) == len(tokens) + 2


@pytest.mark.parametrize("stop", [None, ["e"]])
def test_echo_in_a_stream_scores_each_choices_prompt_once(client: openai.OpenAI, stop: list[str] | None) -> None:
    fields = {**GREEDY, "prompt": ["The sky is", "é"], "max_tokens": 4, "echo": True, "logprobs": 2, "n": 2, "stop": stop}
    whole = client.completions.create(**fields)
    texts, streamed = [""] * 4, [{"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []} for _ in range(4)]
    for chunk in client.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        for name, values in streamed[choice.index].items():
            values += getattr(choice.logprobs, name)
    for choice in whole.choices:
        got, expected = streamed[choice.index], choice.logprobs
        assert (texts[choice.index], got["tokens"], got["text_offset"]) == (choice.text, expected.tokens, expected.text_offset)
        assert got["token_logprobs"][0] is None
        assert got["token_logprobs"][1:] == pytest.approx(expected.token_logprobs[1:], abs=2e-3)
        assert "".join(got["tokens"]) == choice.text


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


@pytest.mark.parametrize(
    "fields", slow_after(1, [{"n": 3, "seed": 3, "stop": [" the"]}, {}, {"stop": [" the"]}, {"prompt": ["A", "B"]}])
)
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


@pytest.mark.slow
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
    assert raw.decode(errors="replace") == choice.message.content == "".join(entry.token for entry in content)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_client_parses_a_model_by_itself(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Person, max_tokens=80, seed=0)
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.slow
def test_other_forms(client: openai.OpenAI) -> None:
    """`structured_outputs`, and the older names of its fields, which mean the same and say that they are old."""

    def ask(**fields: Any) -> tuple[str, str | None]:
        raw = client.completions.with_raw_response.create(
            model=MODEL, prompt="An answer:", max_tokens=40, seed=0, extra_body=fields
        )
        assert ("deprecation" in raw.headers) == ("x-deprecated-fields" in raw.headers)
        return raw.parse().choices[0].text, raw.headers.get("x-deprecated-fields")

    for field, value, fits in (
        ("json", {"enum": [1, "two"]}, lambda text: json.loads(text) in (1, "two")),
        ("json", '{"type": "boolean"}', lambda text: json.loads(text) in (True, False)),
        ("regex", r"\d{4}", lambda text: re.fullmatch(r"\d{4}", text)),
        ("choice", ["yes", "no"], lambda text: text in ("yes", "no")),
        ("grammar", 'root ::= "a" ("b" | "c")', lambda text: text in ("ab", "ac")),
    ):
        text, older = ask(structured_outputs={field: value, "json_object": None})
        assert (bool(fits(text)), older) == (True, None), field
        assert ask(**{f"guided_{field}": value}) == (text, f"guided_{field}; use=structured_outputs")
    assert ask(structured_outputs={"json_object": True})[0].startswith("{")  # it may be long; whole ones are read elsewhere
    assert ask(response_format={"type": "json_object"})[0].startswith("{")
    assert ask(response_format={"type": "text"})[0]


@pytest.mark.slow
def test_a_stream_says_too_which_of_its_fields_are_old(url: str) -> None:
    asked = {"model": MODEL, "prompt": "x", "stream": True, "guided_choice": ["yes"], "guided_json": None}
    response = httpx.post(f"{url}/completions", json=asked, timeout=60)
    assert response.headers["deprecation"].startswith("@")
    assert response.headers["x-deprecated-fields"] == "guided_choice; use=structured_outputs"


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object, model.max_model_len) for model in models] == [(MODEL, "model", CONTEXT)]
    assert (client.models.retrieve(MODEL).id, client.models.retrieve(MODEL).root) == (MODEL, MODEL)
