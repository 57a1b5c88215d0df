"""A stream's pieces, joined, are the answer that comes in one: random requests to a real server, each in both ways. The second
half asks for calls of functions with random schemas, which all arguments have to match.

`CASES=500` is what `make test-api` tries; see `CASES` for how many otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter, defaultdict
from typing import Any

import jsonschema
import openai
import pytest

from solutions.tests import test_tool_calls
from solutions.tests.real_server import MODEL

CASES = min(500, int(os.environ.get("CASES", "60")))
CONCURRENCY = 32
PATIENCE = 600
"""Seconds that no request needs, on a machine with much else to do."""
pytestmark = pytest.mark.timeout(300 + 5 * CASES)
PIECES = [
    "😀", "👩‍👩‍👧", "🇫🇷", "👍🏽", "日本", "語", "한국", "é", "e\u0301", "a\u0308\u0323", "नमस्ते", "ß", "\u200d", "𝔘", "العربية",
    "»", "\ufeff", "\u00a0", " ", "the ", "of ", "42", ", ", "\n", "{", '"',
]  # fmt: skip
"""Characters of one to many bytes and code points, which tokens cut at any byte."""


def text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(1, longest)))


def stops(rng: random.Random, written: str | None) -> list[str]:
    """Stop strings: cut out of what will be written, where that is known, and others."""
    if written is None:
        return rng.sample([" the", "\n", "a", "é", "😀", ". ", "is", "日"], k=2)
    start = rng.randrange(len(written))
    return [written[start : start + rng.randint(1, 6)], "never written"]


def request(rng: random.Random) -> tuple[bool, dict[str, Any]]:
    """Whether it is a chat, and its fields: free text or, so that the answer is known and full of split characters, one
    forced choice; greedy or sampled, with and without stop strings, log-probabilities, several sequences."""
    chat = rng.random() < 0.5
    prompt = text(rng, 12)
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    choice = text(rng, 8).strip() or "x"
    if rng.random() < 0.5:
        fields |= {"guided_choice": [choice], "max_tokens": 100}
    else:
        choice, fields["max_tokens"] = None, rng.randint(1, 16)
    if rng.random() < 0.5:
        fields |= {"stop": stops(rng, choice), "include_stop_str_in_output": rng.random() < 0.5}
    fields |= {"temperature": 0.0} if rng.random() < 0.5 else {"seed": rng.randrange(1000), "top_k": 20}
    if rng.random() < 0.3:
        fields["n"] = 2
    if rng.random() < 0.3:
        fields |= {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
    if not chat and rng.random() < 0.2:
        fields["echo"] = True
    return chat, fields


def tokens(logprobs: Any) -> list[str]:
    """Tokens with a log-probability, of a choice of either kind."""
    if logprobs is None:
        return []
    return [entry.token for entry in logprobs.content] if hasattr(logprobs, "content") else logprobs.tokens


def whole(chat: bool, answer: Any) -> dict[int, tuple[Any, ...]]:
    return {
        choice.index: (
            choice.message.content if chat else choice.text, choice.finish_reason, choice.stop_reason, tokens(choice.logprobs),
        )
        for choice in answer.choices
    }  # fmt: skip


async def joined(chat: bool, stream: Any) -> dict[int, tuple[Any, ...]]:
    texts: dict[int, str] = defaultdict(str)
    parts: dict[int, list[str]] = defaultdict(list)
    ends: dict[int, tuple[Any, Any]] = {}
    async for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in ends, "a piece after the end"
            texts[choice.index] += choice.delta.content if chat else choice.text
            parts[choice.index] += tokens(choice.logprobs)
            if choice.finish_reason:
                ends[choice.index] = (choice.finish_reason, choice.stop_reason)
    return {index: (texts[index], *end, parts[index]) for index, end in ends.items()}


def expected(fields: dict[str, Any]) -> str | None:
    """The text that a forced choice comes to, by `str.find`; None where the model is free."""
    if "guided_choice" not in fields:
        return None
    choice = fields["guided_choice"][0]
    ends = [(choice.find(stop), stop) for stop in fields.get("stop", ()) if stop in choice]
    if ends:
        # of the stop strings that are complete first
        at, stop = min(ends, key=lambda end: end[0] + len(end[1]))
        choice = choice[:at] + (stop if fields["include_stop_str_in_output"] else "")
    return (fields["prompt"] if fields.get("echo") else "") + choice


async def both_ways(client: openai.AsyncOpenAI, turn: asyncio.Semaphore, chat: bool, fields: dict[str, Any]) -> str:
    create = client.chat.completions.create if chat else client.completions.create
    ours = {name: fields[name] for name in ("guided_choice", "include_stop_str_in_output", "top_k") if name in fields}
    rest = {name: value for name, value in fields.items() if name not in ours}
    async with turn:
        answer = whole(chat, await create(model=MODEL, **rest, extra_body=ours))
        pieces = await joined(chat, await create(model=MODEL, **rest, extra_body=ours, stream=True))
    assert pieces == answer, fields
    if "logprobs" in fields:
        assert all("".join(parts) == text for text, *_, parts in answer.values()), fields
    want = expected(fields)
    if want is not None:
        assert {text for text, *_ in answer.values()} == {want}, fields
    return next(iter(answer.values()))[1]


@pytest.mark.slow
def test_a_stream_comes_to_the_whole_answer(url: str) -> None:
    async def all_of_them() -> list[str]:
        turn = asyncio.Semaphore(CONCURRENCY)
        rng = random.Random(0)
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=PATIENCE) as client:
            return await asyncio.gather(*(both_ways(client, turn, *request(rng)) for _ in range(CASES)))

    reasons = asyncio.run(all_of_them())
    assert len(reasons) == CASES
    assert {"stop", "length"} == set(reasons)


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values are short, so that most calls are done within a request's tokens."""
    kinds: list[dict[str, Any]] = [
        {"enum": rng.sample(["é", "a b", 'say "x"', 1, None, True, "😀"], 3)}, {"type": ["boolean", "null"]},
        {"type": "integer", "minimum": rng.randint(-20, 0), "maximum": rng.randint(0, 2000)}, {"const": {"deep": ["é", 1.5]}},
        {"type": "string", "maxLength": rng.randint(0, 6)}, {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{1,4}$"},
    ]  # fmt: skip
    if depth:
        kinds.append({"type": "array", "items": schema(rng, depth - 1), "maxItems": 2})
        kinds.append({"anyOf": [schema(rng, depth - 1), {"type": "null"}]})
        kinds += [an_object(rng, depth - 1)] * 2
    return rng.choice(kinds)


def an_object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(["city", "naïve name", 'q"', "x-y", "日本", "unit"], rng.randint(0, 3))
    required = [name for name in names if rng.random() < 0.6]
    members = {name: schema(rng, depth) for name in names}
    return {"type": "object", "properties": members, "required": required, "additionalProperties": False}


def calling(rng: random.Random) -> dict[str, Any]:
    """A request that has to call one of its functions: greedy, sampled, or so hot that any token comes."""
    functions: list[dict[str, Any]] = []
    while not functions or len(json.dumps(functions)) > 600:  # prompt and answer have to fit the context
        functions = [{"name": f"do_{i}", "parameters": an_object(rng, 2)} for i in range(rng.randint(1, 2))]
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": text(rng, 4)}], "max_tokens": rng.choice([10, 60, 120]),
        "tools": [{"type": "function", "function": {**each, "strict": rng.random() < 0.5}} for each in functions],
        "tool_choice": rng.choice(["required", {"type": "function", "function": {"name": rng.choice(functions)["name"]}}]),
        "parallel_tool_calls": rng.random() < 0.3, "seed": rng.randrange(1000), "temperature": rng.choice([0.0, 1.0, 2.0]),
    }  # fmt: skip
    if rng.random() < 0.3:
        fields |= {"n": 2} if rng.random() < 0.5 else {"stop": ["{", "do", '"']}
    return fields


async def called_both_ways(client: openai.AsyncOpenAI, turn: asyncio.Semaphore, fields: dict[str, Any]) -> list[str | None]:
    """Why its choices ended."""
    async with turn:
        got = test_tool_calls.whole(await client.chat.completions.create(model=MODEL, **fields))
        chunks = [chunk async for chunk in await client.chat.completions.create(model=MODEL, **fields, stream=True)]
    assert test_tool_calls.streamed(chunks, fields.get("n", 1))[0] == got, fields
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in fields["tools"]}
    for _, calls, reason in got:
        done = calls if reason == "tool_calls" else calls[:-1]  # the last one may be cut
        for name, arguments in done:
            jsonschema.validate(json.loads(arguments), parameters[name])
        assert done or reason == "length"
    return [reason for *_, reason in got]


@pytest.mark.slow
def test_streamed_calls_come_to_the_whole_calls_and_match_their_schemas(url: str) -> None:
    async def all_of_them() -> list[list[str | None]]:
        turn = asyncio.Semaphore(CONCURRENCY)
        rng = random.Random(1)
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=PATIENCE) as client:
            return await asyncio.gather(*(called_both_ways(client, turn, calling(rng)) for _ in range(CASES)))

    reasons = Counter(reason for ended in asyncio.run(all_of_them()) for reason in ended)
    assert {*reasons} == {"tool_calls", "length"}
    assert reasons["tool_calls"] > CASES / 3, reasons
