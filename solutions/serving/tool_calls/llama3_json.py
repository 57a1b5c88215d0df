"""Calls as Llama 3.1 and 3.2 write them: JSON objects and nothing else, sometimes behind a token for tools.

<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}; {"name": "weather", "parameters": {"city": "Rome"}}
"""

from __future__ import annotations

from collections.abc import Sequence

from .json_lines import JsonLines
from .source import Source, Step, read_call
from .tool_format import Function

TAG = "<|python_tag|>"


class Llama3Json(JsonLines):
    name = "llama3_json"
    heads = (*JsonLines.heads, *(TAG + head for head in JsonLines.heads))
    key = "parameters"
    separator = "; "
    has_special_tokens = True

    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        yield from source.next_of(TAG)
        call = 0
        while call == 0 or (yield from source.follows(";")):
            yield from read_call(source, call)
            source.begin_call()
            call += 1
