"""Calls as Qwen3-Coder writes them: tags around each argument, and no quotation marks around texts.

    <tool_call>
    <function=weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

A text with conditions (pattern, length) and all other values are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .named_parameters import Parameter, as_json, parameters_of
from .source import Piece, Source, Step
from .tool_format import Form, Function, ToolFormat, const, either, listed, schema, sequence

BEGIN, END = "<tool_call>", "</tool_call>"
NAMES = r"[^<>\s]+"
CLOSE = "</parameter>"


class Qwen3Coder(ToolFormat):
    name = "qwen3_coder"
    heads = (BEGIN,)
    in_text = True

    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        calls = []
        for each in functions:
            parts = [_form(parameter) for parameter in parameters_of(each, NAMES)]
            calls.append(sequence(const(f"\n<function={each.name}>\n"), *parts, const(f"</function>\n{END}")))
        return listed(calls, f"\n{BEGIN}", several)

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        plain = {(each.name, one.name) for each in functions for one in parameters_of(each, NAMES) if one.is_plain}
        call = 0
        while (yield from source.follows(BEGIN)):
            yield from source.expect("<function=")
            name = yield from source.name_before(">")
            yield from source.called(name, call)
            start = "{"
            while (yield from source.expect("<parameter=", "</function>")) != "</function>":
                key = yield from source.name_before(">")
                yield Piece(f"{start}{json.dumps(key, ensure_ascii=False)}: ", call)
                yield from _value(source, call, (name, key) in plain)
                start = ", "
            yield Piece("{}" if start == "{" else "}", call)
            yield from source.expect(END)
            source.begin_call()
            call += 1

    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        texts = []
        for name, given in calls:
            values = {key: one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for key, one in given.items()}
            inside = "".join(f"<parameter={key}>\n{one}\n{CLOSE}\n" for key, one in values.items())
            texts.append(f"{BEGIN}\n<function={name}>\n{inside}</function>\n{END}")
        return "\n".join(texts)


def _form(parameter: Parameter) -> Form:
    """A parameter with its tags, and nothing where it is left out."""
    value = schema(parameter.value, parameter.place)
    if parameter.is_plain:
        choices = parameter.value.get("enum")
        value = either(*map(const, choices)) if choices else {"type": "any_text", "excludes": [CLOSE]}
    whole = sequence(const(f"<parameter={parameter.name}>\n"), value, const(f"\n{CLOSE}\n"))
    return whole if parameter.is_required else {"type": "optional", "content": whole}


def _value(source: Source, call: int, is_plain: bool) -> Step[None]:
    """A value up to its closing tag, as JSON; a plain text piece by piece."""
    yield from source.next_of("\n")
    held, text = "", ""
    if is_plain:
        yield Piece('"', call)
    for step in source.until(CLOSE, needed=True):
        if step is None:
            yield None
            continue
        new = held + step.text
        held = "\n" if new.endswith("\n") else ""  # the one before the tag
        new = new.removesuffix("\n")
        if is_plain:
            yield Piece(json.dumps(new, ensure_ascii=False)[1:-1], call)
        else:
            text += new
    yield Piece('"' if is_plain else as_json(text) or json.dumps(text, ensure_ascii=False), call)
