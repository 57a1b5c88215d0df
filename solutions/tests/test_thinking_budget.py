"""Thoughts on a real engine: the budget, forms behind it, what the template reads, and answers that go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.serving.async_engine import AsyncEngine
from solutions.tests.fake_server import serve
from solutions.tests.reasoning_transcripts import QWEN3_TEMPLATE
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny_llama

ASK = [{"role": "user", "content": "Which town?"}]
CHAT: Any = {"model": "fake", "messages": ASK}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LLMEngine:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_llama(folder, max_position_embeddings=2048)
    made = LLMEngine(EngineConfig(model=str(folder), max_model_len=1024, num_gpu_blocks_override=256, dtype="float32"))
    made.tokenizer.chat_template = QWEN3_TEMPLATE
    return made


@pytest.fixture(scope="module")
def thinker(engine: LLMEngine) -> Iterator[str]:
    pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")
    with serve(AsyncEngine(engine), reasoning_parser="deepseek_r1") as url:
        yield url


NAMES: Any = {"structured_outputs": {"choice": ["Paris", "Rome"]}}
NOW: Any = [{"type": "function", "function": {"name": "now"}}]
ONE_CALL: Any = {"tools": NOW, "tool_choice": "required", "parallel_tool_calls": False}


@pytest.mark.parametrize("budget", [0, pytest.param(1, marks=pytest.mark.slow), 7])
@pytest.mark.parametrize("asked", slow_after(1, [ONE_CALL, NAMES]), ids=["calls", "choice"])
def test_behind_the_budget_the_model_has_to_speak_in_the_form(thinker: str, budget: int, asked: dict[str, Any]) -> None:
    """Exactly then, as random weights end no thought; streamed or not, in each of several choices."""
    body = {**CHAT, "n": 3, "seed": 4, "max_tokens": 200, "thinking_token_budget": budget, **asked}
    with httpx.Client(base_url=thinker, timeout=60) as client:
        answer = client.post("/v1/chat/completions", json=body).json()
        lines = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")
    streamed: list[dict[str, str]] = [{"reasoning": "", "content": ""} for _ in range(3)]
    for line in lines[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            for name in ("reasoning", "content"):
                streamed[choice["index"]][name] += choice["delta"].get(name) or ""
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3 * budget}
    for choice, parts in zip(answer["choices"], streamed, strict=True):
        message = choice["message"]
        assert (message.get("reasoning") or "", message["content"] or "") == (parts["reasoning"], parts["content"])
        assert len(message.get("reasoning") or "") <= budget
        if asked is NAMES:
            assert message["content"] in ("Paris", "Rome")
        else:
            assert {call["function"]["name"] for call in message["tool_calls"]} == {"now"}
            assert choice["finish_reason"] == "tool_calls"


def test_without_a_form_the_budget_holds_too(engine: LLMEngine, thinker: str) -> None:
    body = {**CHAT, "max_tokens": 60, "thinking_token_budget": 9, "return_token_ids": True, "temperature": 0}
    answer = httpx.post(f"{thinker}/v1/chat/completions", json=body).json()
    tokens = answer["choices"][0]["token_ids"]
    assert engine.tokenizer.decode(tokens[9:17]) == "</think>"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 9}
    body |= {"thinking_token_budget": -1}
    answer = httpx.post(f"{thinker}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] is None
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 60}
    free = body | {"chat_template_kwargs": {"enable_thinking": False}}
    message = httpx.post(f"{thinker}/v1/chat/completions", json=free).json()["choices"][0]["message"]
    assert message["content"]
    assert "reasoning" not in message
    for wrong in (-2, 1.5, "5", True):
        error = httpx.post(f"{thinker}/v1/chat/completions", json=body | {"thinking_token_budget": wrong}).json()["error"]
        assert error["param"] == "thinking_token_budget"


TALK: list[dict[str, Any]] = [
    *ASK, {"role": "assistant", "reasoning_content": "Hm, a town.", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    ]},
    {"role": "tool", "tool_call_id": "a", "content": "noon"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "fields", "options"),
    [
        (ASK, {}, {}),
        (ASK, {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        (ASK, {"reasoning_effort": "none"}, {"enable_thinking": False, "reasoning_effort": "none"}),
        (ASK, {"reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        (ASK, {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, {"enable_thinking": True}),
        (ASK, {"add_generation_prompt": False}, {"add_generation_prompt": False}),
        (TALK, {"tools": NOW}, {}),
        ([*ASK, {"role": "assistant", "content": "It is "}], {"continue_final_message": True},
         {"continue_final_message": True, "add_generation_prompt": False}),
    ],
    ids=["plain", "kwargs", "no effort", "effort", "both", "no prompt", "history", "goes on"],
)  # fmt: skip
def test_the_template_gets_what_the_request_sets(
    engine: LLMEngine, thinker: str, messages: list[dict[str, Any]], fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Thoughts of earlier turns, too; by transformers. All routes make the same prompt."""
    told = json.loads(json.dumps(messages))
    for call in [call for message in told for call in message.get("tool_calls", ())]:
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    tools = [{"type": "function", "function": {"name": "now", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}}] if "tools" in fields else None  # fmt: skip
    expected = engine.tokenizer.apply_chat_template(
        [message | {"content": message.get("content") or ""} for message in told], tools=tools,
        **{"add_generation_prompt": True} | options,
    )["input_ids"]  # fmt: skip
    if messages is TALK:
        assert "Hm, a town." in engine.tokenizer.decode(expected)
    body = {"model": "fake", "messages": messages, **fields}
    with httpx.Client(base_url=thinker, timeout=60) as client:
        assert client.post("/tokenize", json=body).json()["tokens"] == expected
        rendered = client.post("/v1/chat/completions/render", json=body).json()
        answer = client.post("/v1/chat/completions", json=body | {"max_tokens": 1, "return_token_ids": True}).json()
    assert rendered["token_ids"] == expected
    assert rendered["prompt_text"] == engine.tokenizer.decode(expected)
    assert answer["prompt_token_ids"] == expected


def test_an_answer_may_begin_with_the_message_that_it_continues(thinker: str) -> None:
    begun = [*ASK, {"role": "assistant", "content": "It is Paris, "}]
    body = {**CHAT, "messages": begun, "continue_final_message": True, "max_tokens": 8, "temperature": 0}
    with httpx.Client(base_url=f"{thinker}/v1/chat/", timeout=60) as client:
        plain = client.post("completions", json=body).json()["choices"][0]["message"]["content"]
        for extra in ({}, {"n": 2}):
            for choice in client.post("completions", json=body | {"echo": True} | extra).json()["choices"]:
                assert choice["message"]["content"] == f"It is Paris, {plain}"
        lines = client.post("completions", json=body | {"echo": True, "stream": True}).text.split("\n\n")[:-2]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(pieces) == f"It is Paris, {plain}"
        own = client.post("completions", json=body | {"messages": ASK, "continue_final_message": None, "echo": True}).json()
        assert "Which town?" not in str(own["choices"])
        both = client.post("completions", json=body | {"add_generation_prompt": True}).json()["error"]
        assert (both["param"], "add_generation_prompt" in both["message"]) == ("continue_final_message", True)
        for taken in ("tokenize", "chat_template", "messages", "add_generation_prompt"):
            error = client.post("completions", json=body | {"chat_template_kwargs": {taken: 1}}).json()["error"]
            assert (error["param"], taken in error["message"]) == ("chat_template_kwargs", True)
