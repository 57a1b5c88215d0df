"""Calls as Llama 3.2 and 4 write them: a list of Python calls and nothing else.

    [weather(city="Paris", days=3), weather(city="Rome")]

What a grammar holds is JSON in the place of Python's values; what a model writes without may be either.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from typing import Any

from .named_parameters import as_json, parameters_of
from .source import BrokenError, Piece, Source, Step
from .tool_format import Form, Function, ToolFormat, const, either, listed, schema, sequence

NAMES = r"[A-Za-z_]\w*"
_PARTS = re.compile(r""""(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[\[({\])},]|["']""", re.DOTALL)


class Pythonic(ToolFormat):
    name = "pythonic"
    heads = ("[",)

    def marks(self, functions: Sequence[Function]) -> tuple[str, ...]:
        return tuple(f"[{each.name}(" for each in functions)

    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        calls = [sequence(const(f"{each.name}("), _arguments(each)) for each in functions]
        return sequence(listed(calls, ", ", several), const("]"))

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        yield from source.expect("[")
        call = 0
        while call == 0 or (yield from source.expect(",", "]")) == ",":
            name = yield from source.name_before("(")
            yield from source.called(name, call)
            start = "{"
            while not (yield from source.follows(")")):
                if start == ", ":
                    yield from source.expect(",")
                key = yield from source.name_before("=")
                yield Piece(f"{start}{json.dumps(key)}: {(yield from _literal(source))}", call)
                start = ", "
            yield Piece("{}" if start == "{" else "}", call)
            source.begin_call()
            call += 1

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        texts = []
        for name, given in calls:
            values = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())
            texts.append(f"{name}({values})")
        return f"[{', '.join(texts)}]"


def _arguments(function: Function) -> Form:
    """All arguments, each after a comma but the first, and the parenthesis behind them."""
    parameters = parameters_of(function, NAMES)
    items = [sequence(const(f"{each.name}="), schema(each.value, each.place)) for each in parameters]

    def behind(index: int) -> list[Form]:
        parts = [(each, sequence(const(", "), item)) for each, item in zip(parameters[index:], items[index:], strict=True)]
        return [part if each.is_required else {"type": "optional", "content": part} for each, part in parts]

    firsts = 1 if parameters and parameters[0].is_required else len(parameters)
    ways = [sequence(items[index], *behind(index + 1), const(")")) for index in range(firsts)]
    if not any(each.is_required for each in parameters):
        ways.append(const(")"))
    return either(*ways)


def _literal(source: Source) -> Step[str]:
    """A value of Python or JSON, as JSON; the comma or parenthesis behind it stays unread."""
    while True:
        depth = 0
        for found in _PARTS.finditer(source.text, source.at):
            char = found[0]
            if char in "\"'":  # a text whose end is still to come
                break
            depth += (char in "[({") - (char in "])}")
            if depth < 0 or (depth == 0 and char == ","):
                text = source.text[source.at : found.start()].strip()
                source.at = found.start()
                return _as_json(text)
        yield from source.more()


def _as_json(text: str) -> str:
    if (value := as_json(text)) is not None:
        return value
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise BrokenError from error
