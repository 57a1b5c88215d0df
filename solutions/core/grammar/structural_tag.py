"""Structural tags of XGrammar: forms made of others, some of which become grammars of this engine's own.

Source: https://xgrammar.mlc.ai/docs/tutorials/structural_tag
"""

from __future__ import annotations

import json
import re
from typing import Any

from .json_schema import to_grammar
from .lark import is_lark, to_ebnf

_SURROGATE = re.compile(r"(?<!\\)(?:\\\\)*(\\(?:u|u\{0*|U0000|x\{0*)[dD][89a-fA-F][0-9a-fA-F]{2})")
"""An escape for half of a surrogate pair in a regex or grammar. XGrammar would write it in bytes that are not UTF-8."""


def checked(kind: str, text: str) -> str:
    """A regex or grammar.

    Raises:
        ValueError: it holds half of a surrogate pair.
    """
    if found := _SURROGATE.search(text):
        place = f"half of a surrogate pair at character {found.start(1) + 1}; write the character itself"
        raise ValueError(f"structured_output: the {kind} is not valid: {place}")
    return text


def to_xgrammar(text: str) -> str:
    """A grammar of either kind as EBNF.

    Raises:
        ValueError: it cannot be.
    """
    if not is_lark(text):
        return checked("grammar", text)
    try:
        return to_ebnf(text)
    except ValueError as error:
        raise ValueError(f"structured_output: the grammar is not valid: {error}") from None


def tag_format(text: str) -> dict[str, Any]:
    """What a structural tag says, in XGrammar's newer form. The older one has `structures` and `triggers`.

    Raises:
        ValueError: it has neither form.
    """
    try:
        tag = json.loads(text)
        if "format" in tag:
            return {**tag["format"]}
        tags = [
            {"type": "tag", "begin": one["begin"], "content": {"type": "json_schema", "json_schema": one["schema"]},
             "end": one["end"]}
            for one in tag["structures"]
        ]  # fmt: skip
        return {"type": "triggered_tags", "triggers": [*tag["triggers"]], "tags": tags}
    except (ValueError, TypeError, KeyError, RecursionError):
        why = 'it must have a "format", or "structures", each with begin, schema and end, and "triggers"'
        raise ValueError(f"structured_output: the structural_tag is not valid: {why}") from None


def with_grammars(part: Any, made: dict[tuple[str, str | None], str]) -> Any:
    """A part of a structural tag, with grammars of ours in the place of JSON schemas, and EBNF in the place of Lark.

    Args:
        made: schema as text and its white space → its grammar.

    Raises:
        ValueError: a part is not valid; of a schema the message begins with its `place` (which is ours), if it has one.
    """
    if isinstance(part, list):
        return [with_grammars(one, made) for one in part]
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "regex" and isinstance(part.get("pattern"), str):
        return {**part, "pattern": checked(kind, part["pattern"])}
    if kind == "grammar" and isinstance(part.get("grammar"), str):
        return {**part, "grammar": to_xgrammar(part["grammar"])}
    if kind != "json_schema" or not part.keys() <= {"type", "json_schema", "place", "white_space"}:
        return {name: with_grammars(one, made) for name, one in part.items()}
    key = json.dumps(part.get("json_schema")), part.get("white_space")
    if key not in made:
        try:
            made[key] = to_grammar(*key)
        except ValueError as error:
            raise ValueError(f"structured_output: {part.get('place', 'json_schema')}: {error}") from None
    return {"type": "grammar", "grammar": made[key]}
