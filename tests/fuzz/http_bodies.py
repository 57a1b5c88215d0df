"""Bodies of HTTP requests: valid ones, broken in a few places. Whatever comes, the answer is no 5xx, and the server goes on.

The server runs in this process over a small random model, made once; so do a tokenizer, a chat template and XGrammar.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx

MODEL = "tiny"
PLAIN = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 1}).encode()
ERROR_KEYS = {"message", "type", "param", "code"}
JSON = {"Content-Type": "application/json"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
HINTS = {"user": "u", "metadata": {"k": "v"}, "seed": 3, "stream_options": {"include_usage": True}, "stream": True}
SAMPLING = {
    "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "stop": ["a", "\n"],
    "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 1.5}, "min_tokens": 1,
    "ignore_eos": True, "stop_token_ids": [7], "skip_special_tokens": False, "cache_salt": "s", "priority": 0,
}  # fmt: skip
FORMS = (
    {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"guided_regex": "a{1,3}"}, {"guided_choice": ["x", "yes"]},
    {"guided_grammar": 'root ::= "a" | "b"'}, {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"choice": ["x"], "regex": None}},
    {"response_format": {"type": "text"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
)  # fmt: skip
PROMPTS = ("hi", ["a", "b"], [1, 2, 3], [[1], [2, 3]])
TALKS = (
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}],
)
RAW = "\ue000"
"""Around what goes into the JSON as it is; a character that nothing else uses."""
NUMBERS = ("1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 400, "9" * 5000, "-0", "1e-400", "0.1e1", "1" + "0" * 18)
TEXTS = (
    "", " ", "\x00", "\ud83d", "\udc00x", "\ud83d\ude00", "é", "e\u0301", "\u2028", "\n\n", "a" * 3000, "{}", "null", "\ufeff",
    "<s>", "<|im_end|>", "body", "((", "root ::= root", "/etc/passwd", "-1", "1e3",
)  # fmt: skip
UNKNOWN = (
    "body",
    "nonsense",
    "tools",
    "tool_choice",
    "suffix",
    "\ud800",
    "a\nb",
    "",
    "prompt_logprobs",
    "best_of",
    "echo",
    "logprobs",
)


@cache
def server() -> Callable[[str, bytes], httpx.Response]:
    """Sends a body to a path of the server, which runs until this process ends."""
    from solutions.core.config import EngineConfig
    from solutions.core.engine import LLMEngine
    from solutions.serving.app import create_app
    from solutions.serving.async_engine import AsyncEngine
    from solutions.tests.tiny_models import make_tiny_llama

    with tempfile.TemporaryDirectory() as folder:
        make_tiny_llama(Path(folder))
        engine = LLMEngine(
            EngineConfig(model=folder, dtype="float32", max_model_len=64, num_gpu_blocks_override=256, max_num_seqs=32)
        )
    running = AsyncEngine(engine)
    transport = httpx.ASGITransport(create_app(running, [MODEL]), raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://server", headers=JSON, timeout=None)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    loop.call_soon_threadsafe(running.start)

    def post(path: str, raw: bytes) -> httpx.Response:
        return asyncio.run_coroutine_threadsafe(client.post(path, content=raw), loop).result()

    return post


def some(rng: random.Random, fields: dict[str, Any]) -> dict[str, Any]:
    """A few of some fields."""
    return {name: fields[name] for name in rng.sample(sorted(fields), rng.randint(0, min(5, len(fields))))}


def generation(rng: random.Random) -> dict[str, Any]:
    """Fields of both kinds of generation."""
    fields = {"model": MODEL, "max_tokens": 2, **some(rng, SAMPLING), **some(rng, HINTS)}
    if rng.random() < 0.3:
        fields |= rng.choice(FORMS)
        fields.pop("ignore_eos", None)
        fields.pop("min_tokens", None)
    return fields


def completion(rng: random.Random) -> dict[str, Any]:
    more = some(rng, {"logprobs": 2, "best_of": 2, "echo": True})
    return {**generation(rng), "prompt": rng.choice(PROMPTS), **more}


def chat(rng: random.Random) -> dict[str, Any]:
    more = some(rng, {"logprobs": True, "top_logprobs": 0, "max_completion_tokens": 2})
    return {**generation(rng), "messages": rng.choice(TALKS), **more}


def tokenize(rng: random.Random) -> dict[str, Any]:
    source = {"prompt": "hi"} if rng.random() < 0.5 else {"messages": rng.choice(TALKS)}
    return {**source, **some(rng, {"model": MODEL, "add_special_tokens": False})}


def detokenize(rng: random.Random) -> dict[str, Any]:
    return {"tokens": [104, 105], **some(rng, {"model": MODEL})}


ROUTES: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "/v1/completions": completion, "/v1/chat/completions": chat, "/tokenize": tokenize, "/detokenize": detokenize,
}  # fmt: skip


def odd(rng: random.Random) -> Any:
    """A value that fits nowhere, or nearly."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice((None, True, False, [], {}, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -1.5, 1e308))
    if kind == 1:
        return f"{RAW}{rng.choice(NUMBERS)}{RAW}"
    if kind == 2:
        value: Any = rng.choice((1, "x", None))
        for _ in range(rng.choice((1, 2, 30, 150, 250, 900))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    if kind == 3:
        return [odd(rng) for _ in range(rng.randint(0, 3))]
    if kind == 4:
        return {rng.choice(TEXTS): odd(rng) for _ in range(rng.randint(0, 2))}
    return rng.choice(TEXTS)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value, of the outer ones too; none deeper than Python can follow."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, item in items:
            found.append((one, key))
            todo.append(item)
    return found


def broken(rng: random.Random, body: dict[str, Any]) -> Any:
    """A copy with something replaced, left out, or added."""
    body = json.loads(json.dumps(body))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        spots = places(body)
        container, key = rng.choice(spots)
        action = rng.random()
        if action < 0.6:
            container[key] = odd(rng)
        elif action < 0.7:
            del container[key]
        elif isinstance(container, dict):
            container[rng.choice(UNKNOWN)] = odd(rng)
        if not body:
            break
    return body if rng.random() < 0.97 else odd(rng)


def written(rng: random.Random, value: Any) -> bytes:
    """The bytes of a body, now and then not JSON, not UTF-8, or with a key twice."""
    try:
        text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    except RecursionError:
        text = "[" * 2000 + "]" * 2000
    text = re.sub(rf'"(?:\\ue000|{RAW})([^"]*?)(?:\\ue000|{RAW})"', r"\1", text)
    raw = text.encode(errors="surrogatepass")
    action = rng.random()
    if action < 0.03 and raw.startswith(b"{"):
        raw = b'{"model": "no", "max_tokens": -1,' + raw[1:] if len(raw) > 2 else raw
    elif action < 0.06 and raw:
        at = rng.randrange(len(raw))
        raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + rng.randint(0, 2) :]
    elif action < 0.07:
        raw = raw[: rng.randrange(len(raw) + 1)]
    elif action < 0.08:
        raw = text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")), errors="surrogatepass")
    return raw


def check_answer(response: httpx.Response) -> None:
    """An answer is whole, or an error with all its fields.

    Raises:
        AssertionError: it is neither.
    """
    assert response.status_code < 500, f"{response.status_code}: {response.text[:300]}"
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            events = response.text.split("\n\n")
            assert events[-2:] == ["data: [DONE]", ""], response.text[-300:]
            assert not any("error" in json.loads(event.removeprefix("data: ")) for event in events[:-2]), response.text[-300:]
        else:
            response.json()
        return
    error = response.json()["error"]
    assert error.keys() == ERROR_KEYS, error
    assert error["code"] in (response.status_code, "context_length_exceeded"), error
    assert isinstance(error["message"], str), error
    assert error["message"].isprintable() or not re.search(r"[\x00-\x1f\ud800-\udfff]", error["message"]), error
    assert isinstance(error["type"], str), error
    assert error["param"] is None or isinstance(error["param"], str), error
    assert "Traceback" not in response.text


def run(rng: random.Random) -> None:
    """One case: a body to one of the routes, then a plain request.

    Raises:
        AssertionError: the server has failed, or its answer is not one.
    """
    path = rng.choice(list(ROUTES))
    raw = written(rng, broken(rng, ROUTES[path](rng)))
    try:
        check_answer(server()(path, raw))
        plain = server()("/v1/completions", PLAIN)
        assert plain.status_code == 200, f"a plain request gets {plain.status_code}: {plain.text[:300]}"
    except Exception as error:
        raise AssertionError(f"{path} {raw[:2000]!r}: {error}") from error
