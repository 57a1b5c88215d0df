"""Calls as plain JSON, an object a line, and nothing else; for models whose template has no form of its own.

{"name": "weather", "arguments": {"city": "Paris"}}
{"name": "weather", "arguments": {"city": "Rome"}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from .source import Source, Step, read_call
from .tool_format import Form, Function, ToolFormat, const, listed, sequence

START = '{"name": "'


class JsonLines(ToolFormat):
    name = "json"
    heads: ClassVar[tuple[str, ...]] = (START, START.replace(" ", ""))
    key: ClassVar[str] = "arguments"
    separator: ClassVar[str] = "\n"

    def openings(self, functions: Sequence[Function]) -> tuple[str, ...]:
        return tuple(f'{mark}{each.name}", "{self.key}": {{' for mark in self.heads for each in functions)

    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        calls = [sequence(const(f'{each.name}", "{self.key}": '), each.arguments, const("}")) for each in functions]
        return listed(calls, f"{self.separator}{START}", several)

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        call = 0
        while call == 0 or (yield from source.follows("{")):
            source.at -= bool(call)
            yield from read_call(source, call)
            source.begin_call()
            call += 1

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        return self.separator.join(json.dumps({"name": name, self.key: given}, ensure_ascii=False) for name, given in calls)
