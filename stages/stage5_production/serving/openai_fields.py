"""What all requests share: fields that are refused, accepted or dropped, plain types, and how an error names a field.

A field that this server cannot honour is refused by name, never ignored. Two kinds of values pass: those that mean "not set",
which are ``null`` and the default that OpenAI documents (see `UNSUPPORTED`), and those that change no answer (see `HINTS`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "name": (None,),
    "annotations": (None, []),
    "reasoning_effort": (None,),
    "refusal": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_call_id": (None,),
    "tool_calls": (None, []),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}
"""Fields of the OpenAI API that are refused, each with the values that mean "not set" and therefore pass."""
HINTS = frozenset({
    "include_obfuscation", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "safety_identifier",
})  # fmt: skip
"""Fields of the OpenAI API that are accepted because they change no answer of this server: who asks, what may be cached for how
long, what the answer will probably be, and how to call tools, which this server does not have."""
Int = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


def text_or_list(value: Any) -> Any:
    """One text is a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return value
    raise ValueError("must be a string or a list")


Strings = Annotated[list[str], BeforeValidator(text_or_list, json_schema_input_type=str | list[str])]


class Request(BaseModel):
    """Base of all requests. Unknown fields are errors; unsupported ones pass only if they mean "not set" or change nothing.

    A null means "not set" in any field, also in one that this request does not have: clients write all that they know of.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        supported = cls.model_fields
        return {
            name: value
            for name, value in data.items()
            if name in supported or not (value is None or name in HINTS or value in UNSUPPORTED.get(name, ()))
        }


def field_path(keys: list[Any]) -> str:
    """The place of a value in a body as a person would write it, such as ``messages[1].name``. A number is an index of a list,
    a text the name of a field; an empty name is written in quotes."""
    raise NotImplementedError("Stage 5 · Task 5.1: field_path, see stages/stage5_production/GUIDE.md#task-5-1")


def describe_validation_error(error: dict[str, Any]) -> tuple[str, str | None]:
    """The first of pydantic's errors as one line and the path of the field, such as ``messages[1].name``.

    ============================================  ====================================================================
    broken JSON (``json_invalid``)                the body is not valid JSON: ERROR at character PLACE; no path
    no path, but two fields that contradict       the message of the ``value_error``; no path
    no path otherwise                             the body must be a JSON object, sent with Content-Type:
                                                  application/json; no path
    ``extra_forbidden``, known to `UNSUPPORTED`   PATH is not supported by this server
    ``extra_forbidden``                           PATH is not a field of this request
    ``missing``                                   PATH is required
    any other                                     PATH: MESSAGE
    ============================================  ====================================================================

    ERROR is in the error's ``ctx``, PLACE in its ``loc``; pydantic's "Value error, " before a message is left out.
    """
    # Hint: The names are the same on both sides; only what differs needs a line of its own: texts for token ids, two
    # names for one limit, two fields for one number.
    raise NotImplementedError("Stage 5 · Task 5.1: describe_validation_error, see stages/stage5_production/GUIDE.md#task-5-1")
