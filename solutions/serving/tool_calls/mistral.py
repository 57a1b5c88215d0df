"""Calls as Mistral's models write them: behind a special token, as a list of JSON objects, or one by one.

    [TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "weather", "arguments": {"city": "Rome"}}]
    [TOOL_CALLS]weather[ARGS]{"city": "Paris"}[TOOL_CALLS]weather[ARGS]{"city": "Rome"}

The second form is that of models from 2025 on.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import Any

from .source import Source, Step, read_call
from .tool_format import Form, Function, ToolFormat, const, either, listed, sequence

CALLS, ARGS = "[TOOL_CALLS]", "[ARGS]"


class Mistral(ToolFormat):
    name = "mistral"
    heads = (CALLS,)
    in_text = True
    has_special_tokens = True

    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        start = '{"name": "'
        objects = [sequence(const(f'{start}{each.name}", "arguments": '), each.arguments, const("}")) for each in functions]
        items = listed(objects, ", ", several)
        lists = [sequence(const(start), items, const("]")) for start in ("[", " [")]
        single = [sequence(const(each.name + ARGS), each.arguments) for each in functions]
        return either(*lists, listed(single, CALLS, several))

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        call = 0
        while (yield from source.follows(CALLS)):
            if (yield from source.follows("[")):
                more = ","
                while more == ",":
                    yield from read_call(source, call)
                    source.begin_call()
                    call += 1
                    more = yield from source.expect(",", "]")
            else:
                name = yield from source.name_before("{")
                source.at -= 1
                yield from source.called(name.removesuffix(ARGS), call)
                yield from source.object(call)
                source.begin_call()
                call += 1

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        return f"{CALLS} {json.dumps([{'name': name, 'arguments': given} for name, given in calls], ensure_ascii=False)}"

    def call_id(self) -> str:
        """Nine letters and digits: templates refuse all others."""
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))

    def id_in_history(self, call_id: str) -> str:
        return re.sub(r"[^A-Za-z0-9]", "", call_id)[-9:].rjust(9, "0")
