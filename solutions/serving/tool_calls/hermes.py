"""Calls as Hermes, Qwen2.5 and Qwen3 write them: a JSON object in tags, behind a text or at once.

I'll look it up.
<tool_call>
{"name": "weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .source import Source, Step, read_call
from .tool_format import Form, Function, ToolFormat, const, listed, sequence

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    name = "hermes"
    heads = (BEGIN,)
    in_text = True

    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        calls = [
            sequence(const(f'\n{{"name": "{each.name}", "arguments": '), each.arguments, const(f"}}\n{END}"))
            for each in functions
        ]
        return listed(calls, f"\n{BEGIN}", several)

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        call = 0
        while (yield from source.follows(BEGIN)):
            yield from read_call(source, call)
            yield from source.expect(END)
            source.begin_call()
            call += 1

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        texts = [json.dumps({"name": name, "arguments": given}, ensure_ascii=False) for name, given in calls]
        return "\n".join(f"{BEGIN}\n{text}\n{END}" for text in texts)
