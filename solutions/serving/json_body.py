"""Reads request bodies as strict JSON.

Python's reader accepts more than RFC 8259 allows: NaN, numbers that become infinite, halves of surrogate pairs. Each would
cause an error later and elsewhere, so it is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from .errors import RequestError
from .openai_fields import field_path

MAX_DEPTH = 200
"""Most lists and objects inside each other. Python's own limit is about five times that, and depends on the caller's stack."""
MAX_DIGITS = 308
"""Most digits of an integer: a longer one does not fit into a float."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair or not
_MANY_DIGITS = re.compile(rf"\d{{{MAX_DIGITS + 1}}}")


def read_json(raw: bytes) -> Any:
    """The value of a body.

    Raises:
        RequestError: it is not UTF-8, is nested too deeply, or holds a value that is not valid; names the field.
        json.JSONDecodeError: it is not JSON.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8 at byte {error.start}") from None
    odd_numbers: list[str] = []

    def number(digits: str) -> float:
        value = float(digits)  # also of NaN, Infinity and -Infinity
        if not math.isfinite(value):
            odd_numbers.append(digits)
        return value

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise RequestError(f"a number has {len(digits)} digits; the limit is {MAX_DIGITS}")
        return int(digits)

    hooks: dict[str, Any] = {"parse_float": number, "parse_constant": number}
    if _MANY_DIGITS.search(text):  # only then, because a call for each of a prompt's token ids is slow
        hooks["parse_int"] = integer
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise RequestError(f"the body is nested more than {MAX_DEPTH} levels deep") from None
    if odd_numbers or text.count("[") + text.count("{") > MAX_DEPTH or _SURROGATE.search(text):
        _check(value)
    return value


def _check(body: Any) -> None:
    """Walk through a value, without recursion, and look at each text and number.

    Raises:
        RequestError: one is not valid, or the value is nested too deeply.
    """
    todo: list[tuple[Any, tuple[Any, ...]]] = [(body, ())]  # a value, and its path: (path of what it is in, key)
    depths = [0]
    while todo:
        value, path = todo.pop()
        depth = depths.pop()
        if isinstance(value, (dict, list)):
            if depth >= MAX_DEPTH:
                raise _refusal(path, f"is nested more than {MAX_DEPTH} levels deep", top=True)
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(item, (dict, list, str, float)) or isinstance(key, str):
                    todo.append((item, (path, key)))
                    depths.append(depth + 1)
        elif isinstance(value, float) and not math.isfinite(value):
            raise _refusal(path, f"must be a finite number, got {value}")
        if any(isinstance(text, str) and not _is_text(text) for text in (value, path[1] if path else None)):
            raise _refusal(path, "holds half of a surrogate pair, which is not a character")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(path: tuple[Any, ...], problem: str, top: bool = False) -> RequestError:
    """An error that names the field; `top`: only the outermost one."""
    keys: list[Any] = []
    while path:
        path, key = path
        keys.insert(0, key)
    field = field_path(keys[:1] if top else keys)
    return RequestError(f"{field or 'the body'}: {problem}", field or None)


class JsonRequest(Request):
    """A request whose body is read by `read_json`, once: who changes the value changes it for all."""

    async def json(self) -> Any:
        """The body's value; for what it raises see `read_json`."""
        if not hasattr(self, "_value"):
            self._value = read_json(await self.body())
        return self._value


class JsonRoute(APIRoute):
    """A route whose requests are `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a request of the other class."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handler
