"""The fields that ask for a form of the answer: OpenAI's `response_format`, vLLM's `structured_outputs`, and its older names.

Source: https://platform.openai.com/docs/guides/structured-outputs, https://docs.vllm.ai/en/latest/features/structured_outputs
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi.responses import Response
from pydantic import Field, PlainValidator, model_validator

from ..batching.sampling_params import StructuredOutput
from ..core.grammar.structural_tag import tag_format
from .errors import RequestError
from .openai_fields import Bool, Request

OLDER = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
"""vLLM's names before version 0.12, each for one field of `StructuredOutputs`."""
OLDER_SPACE = "guided_whitespace_pattern"
"""Its name for `whitespace_pattern`, beside `guided_json`."""
FORMS = ("response_format", "structured_outputs", *OLDER)
"""Fields that ask for a form of the answer, at most one of which a request may have."""
OLD_SINCE = "@1795910400"
"""29 November 2026, as RFC 9745 writes it: since then the older names are deprecated here."""


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
    """OpenAI's way to ask for a structured answer, and vLLM's third type, `structural_tag`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """Of a `json_object`, as llama.cpp and others have it."""
    format: dict[str, Any] | None = None
    """Of a structural tag; see `tag_format`."""
    structures: list[Any] | None = None
    triggers: list[Any] | None = None

    @property
    def json_form(self) -> dict[str, Any] | None:
        """The schema that it asks for."""
        return self.schema_ if self.json_schema is None else self.json_schema.schema_

    @property
    def tag(self) -> dict[str, Any]:
        """What it says of a structural tag."""
        parts = {"format": self.format, "structures": self.structures, "triggers": self.triggers}
        return {name: value for name, value in parts.items() if value is not None}

    @model_validator(mode="after")
    def _check_tag(self) -> ResponseFormat:
        if bool(self.tag) != (self.type == "structural_tag"):
            raise ValueError("the type structural_tag needs format, or structures and triggers; no other type may have them")
        return self

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise ValueError("the type json_schema needs json_schema, and no other type may have it")
        if self.schema_ is not None and self.type != "json_object":
            raise ValueError("only the type json_object may have schema")
        return self


class StructuredOutputs(Request):
    """vLLM's way, as of version 0.12: exactly one of these, and for JSON perhaps a `whitespace_pattern`."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """In EBNF, with a first rule ``root``, or in Lark, with a rule ``start``."""
    json_object: Annotated[bool, Field(strict=True)] | None = None
    structural_tag: Schema | None = None
    """See `tag_format`; an object, or the text of one."""
    whitespace_pattern: str | None = None
    """What may stand between the parts of JSON, as a regular expression."""

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that ask for something, by their names in a body."""
        fields = self.model_dump(by_alias=True, exclude={"whitespace_pattern"})
        return {name: value for name, value in fields.items() if value not in (None, False)}

    @model_validator(mode="after")
    def _check_number(self) -> StructuredOutputs:
        if len(self.asked) != 1:
            names = (field.alias or name for name, field in type(self).model_fields.items() if name != "whitespace_pattern")
            raise ValueError(f"needs exactly one of {', '.join(names)}")
        return self


class FormFields(Request):
    """The fields of a request."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    """Older names of `structured_outputs`' fields, as the four below."""
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    @property
    def form(self) -> tuple[str, StructuredOutput] | None:
        """The field that asks for a form of the answer, and the form.

        Raises:
            RequestError: there are several, or one cannot be.
        """
        asked = {name: value for name in FORMS if (value := getattr(self, name)) is not None}
        if self.guided_whitespace_pattern is not None and self.guided_json is None:
            raise RequestError(f"{OLDER_SPACE} needs guided_json", OLDER_SPACE)
        return form_of(asked, self.guided_whitespace_pattern)


def form_of(asked: dict[str, Any], space: str | None = None) -> tuple[str, StructuredOutput] | None:
    """The field that asks for a form of the answer, and the form.

    Args:
        asked: those of `FORMS` that a request has.
        space: what may stand between the parts of JSON, for the older names.

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
        schema = value.json_form
        kind, value = (value.type, value.tag) if schema is None else ("json", schema)
    elif isinstance(value, StructuredOutputs):
        space = value.whitespace_pattern
        ((kind, value),) = value.asked.items()
        name = f"{name}.{kind}"
    else:
        kind = name.removeprefix("guided_")
    text = "" if kind == "json_object" else value if isinstance(value, str) else json.dumps(value)
    try:
        if kind == "structural_tag":
            tag_format(text)
        if kind == "json" and text is value:
            _check_json(text)
        return name, StructuredOutput(kind, text, space)
    except ValueError as error:
        raise RequestError(str(error).replace("structured_output", name), name) from error


def _check_json(text: str) -> None:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"structured_output: the json is not valid: {error}") from None


def mark_older(response: Response, asked: set[str]) -> Response:
    """An answer with headers that name those of the request's fields that have newer names."""
    if older := [name for name in (*OLDER, OLDER_SPACE) if name in asked]:
        response.headers["Deprecation"] = OLD_SINCE
        response.headers["X-Deprecated-Fields"] = ", ".join(f"{name}; use=structured_outputs" for name in older)
    return response
