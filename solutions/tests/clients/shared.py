"""What the scripts of all clients share: the features' names, one question, one tool, and what a right answer to each is.

A script runs in its client's own environment, so this file needs nothing but Python. `feature` names a function that is the
feature's test; `run` calls them all and prints a line of JSON for each. `shared.mjs` is the same for Node.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

URL = os.environ.get("CLIENT_URL", "")
"""The server's address, with ``/v1``."""
MODEL = os.environ.get("CLIENT_MODEL", "")
CALLS = os.environ.get("CLIENT_TOOL_CHOICE", "required")
"""The first turn's `tool_choice`; with "auto" the model decides, which the default model rarely does well."""
E = TypeVar("E", bound=Exception)
FEATURES = (
    "chat",
    "stream",
    "usage",
    "completions",
    "tools",
    "streamed tools",
    "tool loop",
    "JSON schema",
    "regex and grammar",
    "log-probabilities",
    "responses",
    "embeddings",
    "overflow error",
)
"""In the order of the table's columns."""

QUESTION = "What is the capital of France?"
BEGINNING = "The capital of France is"
"""What a completion goes on with."""
MESSAGES = [{"role": "user", "content": QUESTION}]
LIMIT = 32
"""Tokens that are enough for the whole answer."""
ASKED = "What is the weather in Paris?"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Name of the city", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": CITY},
}
WEATHER = "Sunny, 21 degrees."
"""What the tool answers."""
TOO_LONG = "colour " * 5000
"""More tokens than the server's context has."""

_tests: dict[str, Callable[[], None]] = {}
_asked_of_the_tool: list[str] = []


def feature(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Decorator: the function raises an exception unless the client has this feature with this server."""
    assert name in FEATURES, name

    def enter(test: Callable[[], None]) -> Callable[[], None]:
        _tests[name] = test
        return test

    return enter


def run() -> None:
    """Run the features that the command line names, or all; a line of JSON for each, and the traceback of what fails."""
    for name in sys.argv[1:] or list(_tests):
        error = None
        try:
            _tests[name]()
        except Exception as failed:
            traceback.print_exc()
            error = " ".join(f"{type(failed).__name__}: {failed}".split())[:300]
        print(json.dumps({"feature": name, "error": error}), flush=True)


def post(path: str, **fields: Any) -> dict[str, Any]:
    """The server's answer to a request that no client's code has touched."""
    body = json.dumps({"model": MODEL, "temperature": 0, **fields}).encode()
    request = urllib.request.Request(f"{URL}/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        read: dict[str, Any] = json.load(answer)
    return read


def same(text: str | None) -> None:
    """The text is the server's greedy answer to the question."""
    right = post("chat/completions", messages=MESSAGES, max_tokens=LIMIT)["choices"][0]["message"]["content"]
    assert text == right, f"{text!r} is not {right!r}"


def goes_on(text: str | None) -> None:
    """The text is the server's greedy completion of the beginning."""
    right = post("completions", prompt=BEGINNING, max_tokens=LIMIT)["choices"][0]["text"]
    assert text == right, f"{text!r} is not {right!r}"


def counted(prompt_tokens: int | None, completion_tokens: int | None) -> None:
    """Both numbers are those of the answer to the question."""
    right = post("chat/completions", messages=MESSAGES, max_tokens=LIMIT)["usage"]
    numbers = right["prompt_tokens"], right["completion_tokens"]
    assert (prompt_tokens, completion_tokens) == numbers, f"{prompt_tokens}, {completion_tokens} are not {numbers}"


def embedded(vector: list[float]) -> None:
    """The vector is the server's for the question, but for what a batch or an encoding rounds."""
    right = post("embeddings", input=QUESTION)["data"][0]["embedding"]
    assert len(vector) == len(right), len(vector)
    assert sum(a * b for a, b in zip(vector, right, strict=True)) > 0.99 * sum(b * b for b in right), vector[:4]


def a_city(value: Any) -> None:
    """It is what `CITY` describes, as an object or as its JSON."""
    value = json.loads(value) if isinstance(value, str) else value
    assert list(value) == ["city"], value
    assert isinstance(value["city"], str), value
    assert len(value["city"]) <= 12, value


def a_call(name: str | None, arguments: Any) -> None:
    assert name == "get_weather", name
    a_city(arguments)


def get_weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Name of the city
    """
    _asked_of_the_tool.append(city)
    return WEATHER


def looped(answer: Any) -> None:
    """The tool was called, with a name, and the model has then answered; of a model that calls by itself, with the result."""
    cities = _asked_of_the_tool.copy()
    _asked_of_the_tool.clear()
    assert {type(city) for city in cities} == {str}, f"the tool was called with {cities}"
    assert isinstance(answer, str), f"the answer was {answer!r}"
    assert answer.strip(), "the answer was empty"
    assert CALLS != "auto" or ("Paris" in cities and "21" in answer), f"the tool was called with {cities}, and then: {answer}"


def in_pieces(pieces: list[str]) -> str:
    """The whole of what came in several pieces."""
    assert len(pieces) > 1, pieces
    return "".join(pieces)


def raised(kind: type[E], ask: Callable[[], Any]) -> E:
    """The error of this class that the client raises."""
    try:
        answer = ask()
    except kind as error:
        return error
    raise AssertionError(f"no error but {str(answer)[:200]}")
