"""Reads a JSON schema as a document, limits its size, checks each keyword, and follows its references.

Each keyword of any draft is either honoured or refused by `refuse`, with the keyword and its path. A keyword that no draft
knows is an annotation, as in the standard (2020-12, core 6.5), unless it looks like a known keyword misspelled.

Source: https://json-schema.org/draft/2020-12, and drafts 4 to 2019-09 for the keywords that were renamed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

MAX_NODES = 50_000
"""Most values in a schema, each key's counted once."""
MAX_DEPTH = 200

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = {
    "$anchor", "$comment", "$defs", "$id", "$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema",
    "default", "definitions", "deprecated", "description", "examples", "id", "readOnly", "title", "writeOnly",
}  # fmt: skip
ONE = {"additionalProperties", "contains", "else", "if", "not", "propertyNames", "then", "unevaluatedItems",
       "unevaluatedProperties", "additionalItems"}  # fmt: skip
SEVERAL = {"allOf", "anyOf", "oneOf", "prefixItems"}
NAMED = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
COUNTS = {"maxContains", "maxItems", "maxLength", "maxProperties", "minContains", "minItems", "minLength", "minProperties"}
NUMBERS = {"maximum", "minimum", "multipleOf"}
OTHERS = {"$ref", "const", "dependencies", "dependentRequired", "enum", "exclusiveMaximum", "exclusiveMinimum", "format",
          "items", "pattern", "required", "type", "uniqueItems"}  # fmt: skip
REFUSED = {"$dynamicRef", "$recursiveRef", "disallow", "divisibleBy", "extends"}
KEYWORDS = ONE | SEVERAL | NAMED | COUNTS | NUMBERS | OTHERS
DATA = {"const", "default", "enum", "example", "examples"}
MARKS = ("_", "x-")
"""How names begin that are a schema's own and say nothing; of others, those that look like a keyword are misspelled."""
_PLAIN = {name.lower(): name for name in KEYWORDS}
IN_PLACE = {"$ref", "allOf", "anyOf", "dependencies", "dependentSchemas", "else", "if", "not", "oneOf", "then"}


def refuse(keyword: str, path: str, why: str = "is not supported") -> ValueError:
    """The error of a schema that cannot be had."""
    return ValueError(f'the keyword "{keyword}" at {path} {why}')


def child(path: str, *parts: str | int) -> str:
    """The path of what is inside, such as ``$.properties.a[0]``."""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        else:
            path += f".{part}" if part.lstrip("$").isidentifier() else f"[{json.dumps(part, ensure_ascii=False)}]"
    return path


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema within the document; two of the same `key` mean the same."""

    key: int
    value: Any = field(compare=False, hash=False)
    path: str = field(compare=False, hash=False)


class Document:
    """A schema with all that it refers to.

    Args:
        text: the schema as JSON.

    Raises:
        ValueError: it is not JSON, no schema, too large, or has what cannot be had; the message says where.
    """

    def __init__(self, text: str) -> None:
        try:
            root = json.loads(text, parse_constant=_no_constant)
            json.dumps(root, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a surrogate pair") from None
        except RecursionError:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"it is not JSON: {error}") from None
        except ValueError as error:  # Python's limit for the digits of an integer
            reason = str(error) if str(error).startswith("it is") else "a number in it has too many digits"
            raise ValueError(reason) from None
        self._keys: dict[Any, int] = {}
        self._of: dict[int, tuple[int, str, str]] = {}  # id of a value → its key, path, base
        self._resources: dict[str, Any] = {}
        self._root = root
        draft = root.get("$schema", "") if isinstance(root, dict) else ""
        self._old_ids = isinstance(draft, str) and ("draft-04" in draft or "draft-03" in draft)
        self._nodes = 0
        self._resources[""] = root
        self._index(root, "$", "", 0, False)
        self._checked: set[int] = set()
        self._check(self.schema(root, "$"))

    @property
    def root(self) -> Schema:
        return self.schema(self._root, "$")

    def schema(self, value: Any, path: str) -> Schema:
        """A part of the document as a schema."""
        if isinstance(value, bool):
            return Schema(-1 - value, value, path)
        if not isinstance(value, dict):
            raise ValueError(f"{path} must be a schema, that is an object, true or false")
        key, path, _ = self._of[id(value)]
        return Schema(key, value, path)

    def _index(self, value: Any, path: str, base: str, depth: int, data: bool) -> int:
        """Give a value its key, and note what names it has."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            base = base if data else self._names(value, base)
            parts: Any = (
                "{",
                base,
                *((k, self._index(v, child(path, k), base, depth + 1, data or k in DATA)) for k, v in value.items()),
            )
        elif isinstance(value, list):
            parts = ("[", *(self._index(v, child(path, i), base, depth + 1, data) for i, v in enumerate(value)))
        else:
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the number at {path} is too large")
            parts = (type(value).__name__, value)
        key = self._keys.setdefault(parts, len(self._keys))
        if isinstance(value, dict):
            self._of[id(value)] = key, path, base
        return key

    def _names(self, value: dict[str, Any], base: str) -> str:
        for name in ("$id", "id") if self._old_ids else ("$id",):
            if isinstance(text := value.get(name), str):
                place = urljoin(base, text)
                self._resources.setdefault(place, value)
                if not text.startswith("#"):
                    base = urldefrag(place).url
                    self._resources.setdefault(base, value)
        if isinstance(anchor := value.get("$anchor"), str):
            self._resources.setdefault(f"{base}#{anchor}", value)
        return base

    def target(self, schema: Schema) -> Schema:
        """What the ``$ref`` of a schema refers to.

        Raises:
            ValueError: nothing, or something outside the document.
        """
        ref = schema.value["$ref"]
        where = urljoin(self._of[id(schema.value)][2], ref)
        url, fragment = urldefrag(where)
        if where in self._resources and fragment and not fragment.startswith("/"):
            return self.schema(self._resources[where], schema.path)
        at: Any = self._resources.get(url)
        path = "$"
        if url not in self._resources:
            raise refuse("$ref", schema.path, f"refers to {ref!r}, which is outside the schema; put it under $defs")
        for part in unquote(fragment).split("/")[1:] if fragment else ():
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                at = at[int(part)] if isinstance(at, list) else at[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise refuse("$ref", schema.path, f"refers to {ref!r}, which is not there") from None
            path = child(path, part)
        if fragment and not fragment.startswith("/"):
            raise refuse("$ref", schema.path, f"refers to {ref!r}, which is not there")
        return self.schema(at, path)

    def _check(self, first: Schema) -> None:
        """Look at all schemas that can be reached."""
        stack = [first]
        while stack:
            schema = stack.pop()
            if isinstance(schema.value, bool) or id(schema.value) in self._checked:
                continue
            self._checked.add(id(schema.value))
            for keyword, value in schema.value.items():
                if keyword in REFUSED:
                    raise refuse(keyword, schema.path)
                if keyword not in KEYWORDS and keyword not in ANNOTATIONS and not keyword.startswith(MARKS):
                    plain = _PLAIN.get(keyword.replace("_", "").replace("-", "").lower())
                    if plain:
                        raise refuse(keyword, schema.path, f'is none; "{plain}" is')
                problem = _problem(keyword, value)
                if problem:
                    raise refuse(keyword, schema.path, problem)
            stack.extend(self.schema(value, path) for path, value in parts(schema))
            if "$ref" in schema.value:
                stack.append(self.target(schema))


def parts(schema: Schema) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, but for definitions, with their paths."""
    for keyword, value in schema.value.items():
        path = child(schema.path, keyword)
        if keyword in ONE or (keyword == "items" and not isinstance(value, list)):
            yield path, value
        elif keyword in SEVERAL or keyword == "items":
            yield from ((child(path, i), one) for i, one in enumerate(value))
        elif keyword in NAMED - ANNOTATIONS:
            yield from ((child(path, name), one) for name, one in value.items())
        elif keyword == "dependencies":
            yield from ((child(path, name), one) for name, one in value.items() if not isinstance(one, list))


def _no_constant(name: str) -> Any:
    raise ValueError(f"it is not JSON: {name} is no number")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _problem(keyword: str, value: Any) -> str | None:
    """What is wrong with the form of a keyword's value."""
    rules: list[tuple[set[str], bool, str]] = [
        (ONE, isinstance(value, bool | dict), "must be a schema"),
        ({"items"}, isinstance(value, bool | dict | list), "must be a schema"),
        (SEVERAL, isinstance(value, list) and bool(value), "must be a list of schemas, and not empty"),
        (NAMED | {"dependencies", "dependentRequired"}, isinstance(value, dict), "must be an object"),
        (COUNTS, _number(value) and value >= 0 and value == int(value), "must be a whole number that is not negative"),
        (NUMBERS, _number(value), "must be a number"),
        ({"multipleOf"}, _number(value) and value > 0, "must be greater than 0"),
        ({"exclusiveMaximum", "exclusiveMinimum"}, isinstance(value, int | float), "must be a number"),
        ({"uniqueItems"}, isinstance(value, bool), "must be true or false"),
        ({"$ref", "pattern", "format"}, isinstance(value, str), "must be a string"),
        ({"required"}, _strings(value), "must be a list of strings"),
        ({"enum"}, isinstance(value, list) and bool(value), "must be a list, and not empty"),
        ({"dependentRequired"}, isinstance(value, dict) and all(map(_strings, value.values())), "must hold lists of strings"),
    ]
    for names, holds, message in rules:
        if keyword in names and not holds:
            return message
    if keyword == "type":
        types = [value] if isinstance(value, str) else value
        if not _strings(types) or not types or not set(types) <= set(TYPES):
            return f"must be one of {', '.join(TYPES)}, or a list of them"
    return None
