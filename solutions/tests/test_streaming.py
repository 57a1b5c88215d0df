"""A stream's pieces, joined, are the answer that comes in one: random requests to a real server, each in both ways.

`CASES=500` is what `make test-api` tries; see `CASES` for how many otherwise.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from typing import Any

import openai
import pytest

from solutions.tests.real_server import MODEL

CASES = min(500, int(os.environ.get("CASES", "60")))
CONCURRENCY = 32
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
        async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(both_ways(client, turn, *request(rng)) for _ in range(CASES)))

    reasons = asyncio.run(all_of_them())
    assert len(reasons) == CASES
    assert {"stop", "length"} == set(reasons)
