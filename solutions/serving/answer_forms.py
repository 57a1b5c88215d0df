"""The fields that ask for a form of the answer: OpenAI's `response_format`, vLLM's `structured_outputs`, and its older names.

Source: https://platform.openai.com/docs/guides/structured-outputs, https://docs.vllm.ai/en/latest/features/structured_outputs
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import Field, PlainValidator, model_validator

from ..batching.sampling_params import StructuredOutput
from .errors import RequestError
from .openai_fields import Bool, Request

OLDER = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""vLLM's names before version 0.12, each for one field of `StructuredOutputs`."""
FORMS = ("response_format", "structured_outputs", *OLDER)
"""Fields that ask for a form of the answer, at most one of which a request may have."""
OLD_SINCE = "@1795910400"
"""29 November 2026, as RFC 9745 writes it: since then the older names are deprecated here."""
_LARK = re.compile(r"^\??\w+(\.\d+)?\s*:(?!:=)|^%(import|ignore|declare)\b", re.MULTILINE)
"""A rule as Lark writes it, or one of its directives."""


def _schema(value: Any) -> Any:
    """An object, or the text of one."""
    if isinstance(value, (dict, str)):
        return value
    raise ValueError("must be a JSON schema: an object, or the text of one")


Schema = Annotated[Any, PlainValidator(_schema, json_schema_input_type=dict[str, Any] | str)]
Choices = Annotated[list[str], Field(min_length=1)]


class JsonSchema(Request):
    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: Bool | None = None
    """Accepted either way: an answer always follows the schema."""


class ResponseFormat(Request):
    """OpenAI's way to ask for a structured answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("the type json_schema needs json_schema, and no other type may have it")
        return self


class StructuredOutputs(Request):
    """vLLM's way, as of version 0.12: exactly one of these. Its `structural_tag` and settings of white space are refused."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """In EBNF; the first rule is ``root``."""
    json_object: Annotated[bool, Field(strict=True)] | None = None

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that ask for something, by their names in a body."""
        return {name: value for name, value in self.model_dump(by_alias=True).items() if value not in (None, False)}

    @model_validator(mode="after")
    def _check_number(self) -> StructuredOutputs:
        if len(self.asked) != 1:
            there = ", ".join(field.alias or name for name, field in type(self).model_fields.items())
            raise ValueError(f"needs exactly one of {there}")
        return self


def form_of(asked: dict[str, Any]) -> tuple[str, StructuredOutput] | None:
    """The field that asks for a form of the answer, and the form.

    Args:
        asked: those of `FORMS` that a request has.

    Raises:
        RequestError: there are several, or one cannot be.
    """
    names = [name for name, value in asked.items() if getattr(value, "type", "") != "text"]
    if not names:
        return None
    if len(names) > 1:
        raise RequestError(f"{names[1]} cannot be combined with {names[0]}", names[1])
    name, value = names[0], asked[names[0]]
    if isinstance(value, ResponseFormat):
        kind, value = ("json_object", "") if value.json_schema is None else ("json", value.json_schema.schema_)
    elif isinstance(value, StructuredOutputs):
        ((kind, value),) = value.asked.items()
        name = f"{name}.{kind}"
    else:
        kind = name.removeprefix("guided_")
    text = "" if kind == "json_object" else value if isinstance(value, str) else json.dumps(value)
    if kind == "grammar" and "::=" not in text and _LARK.search(text):
        raise RequestError(f"{name}: this is a grammar of Lark; write it in EBNF, with a rule root ::= ...", name)
    try:
        return name, StructuredOutput(kind, text)
    except ValueError as error:
        raise RequestError(str(error).replace("structured_output", name), name) from error


def mark_older(response: Response, asked: set[str]) -> Response:
    """An answer with headers that name those of the request's fields that have newer names."""
    if older := [name for name in OLDER if name in asked]:
        response.headers["Deprecation"] = OLD_SINCE
        response.headers["X-Deprecated-Fields"] = ", ".join(f"{name}; use=structured_outputs" for name in older)
    return response
