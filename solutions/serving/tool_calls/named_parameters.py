"""A function's parameters one by one, for formats that write no JSON object but each by its name."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from .tool_format import Function

PLAIN = {"default", "description", "enum", "examples", "title", "type"}
"""Keywords of a text that is written as it is."""
SHARED = ("$defs", "definitions")
TOP = {"$id", "$schema", "additionalProperties", "description", "properties", "required", "title", "type", *SHARED}


@dataclass(slots=True)
class Parameter:
    """A parameter; `value` is its schema, with all that it refers to."""

    name: str
    value: Any
    is_required: bool
    place: str

    @property
    def is_plain(self) -> bool:
        """Whether it is a text without other conditions than a list of those that it may be."""
        value = self.value
        if not isinstance(value, dict) or not value.keys() <= {*PLAIN, *SHARED}:
            return False
        texts = value.get("enum", [])
        return value.get("type", "string" if texts else "") == "string" and all(isinstance(one, str) for one in texts)


def parameters_of(function: Function, names: str) -> list[Parameter]:
    """Those that a function must have, then those that it may have.

    Args:
        names: what a name has to look like, as a regular expression.

    Raises:
        ValueError: its schema asks for more than values by name.
    """
    top = function.parameters
    if more := sorted(top.keys() - TOP):
        raise ValueError(
            f"{function.place}: the keyword {more[0]!r} is not supported here, because this model's calls name each argument"
        )
    known, required = top.get("properties", {}), top.get("required", [])
    if not isinstance(known, dict) or not isinstance(required, list):
        raise ValueError(f"{function.place}: properties must be an object, and required a list")
    for name in (*known, *required):
        if name not in known or not re.fullmatch(names, name):
            reason = "is required and no property" if name not in known else "is no name that this model's calls can have"
            raise ValueError(f"{function.place}: {name!r} {reason}")
    shared = {key: top[key] for key in SHARED if key in top}
    found = [
        Parameter(name, value | shared if isinstance(value, dict) else value, name in required, function.place)
        for name, value in known.items()
    ]
    return sorted(found, key=lambda each: not each.is_required)


def as_json(text: str) -> str | None:
    """A text that is JSON as it is, any other as None."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return text.strip()
