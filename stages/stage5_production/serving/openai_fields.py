"""What all requests share: fields that are refused, accepted or dropped, plain types, and how an error names a field.

A field that would change the answer and cannot be honoured is refused by name (`UNSUPPORTED`). A null means "not set" in any
field. What changes no answer passes (`HINTS`). What nobody knows is an error here; `ignored_fields.py` makes it less.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "refusal": ("",),
    "suffix": ("",),
    "tool_call_id": (),
    "tool_calls": ([],),
    "tool_choice": ("none",),
    "tools": ([],),
    "web_search_options": (),
    # vLLM's
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "disable_additional_properties": (False,),
    "best_of": (1,),
    "disable_any_whitespace": (False, True),  # what there is between the parts of JSON is fixed already
    "guided_json_object": (False,),
    "prompt_embeds": (),
    "repetition_detection": (),
    "structural_tag": (),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
    "whitespace_pattern": (),
    # what others call a form of the answer
    "ebnf": (),
    "format": (),
    "grammar": ("",),
    "json_schema": (),
    "regex": (),
    # samplers of llama.cpp and others
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "mirostat": (0,),
    "repeat_penalty": (1,),
    "tfs_z": (1,),
    "top_a": (0,),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
"""Fields that would change the answer and are refused, each with the values that mean "not set" and therefore pass."""
HINTS = frozenset({
    "annotations", "cache_control", "include_obfuscation", "index", "metadata", "name", "parallel_tool_calls",
    "parsed_arguments", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "reasoning_effort",
    "safety_identifier", "service_tier", "store", "verbosity",
})  # fmt: skip
"""Fields that are accepted because they change no answer of this server: who speaks or asks, what may be cached or kept, what
the answer will probably be, how fast and how thoughtful it shall be, and how to call tools, where there are none."""
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


def unless_empty(value: Any) -> Any:
    """An empty list is none: some clients always send one."""
    return None if value == [] else value


def without_nulls(value: Any) -> Any:
    """A dictionary without the keys that are not set."""
    return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


Strings = Annotated[list[str], BeforeValidator(text_or_list, json_schema_input_type=str | list[str])]


class Request(BaseModel):
    """Base of all requests and of the objects in them. Unknown fields are errors; unsupported ones pass only if they mean "not
    set" or change nothing.

    A null is as good as no field at all, also of one that this request does not have: clients write all that they know of.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = without_nulls(data)
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: value
            for name, value in data.items()
            if name in known or not (name in HINTS or value in UNSUPPORTED.get(name, ()))
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


def validation_code(error: dict[str, Any]) -> str | None:
    """OpenAI's word for what one of pydantic's errors says of a field; None: it has none, or the whole body is at fault."""
    kind, loc = error["type"], error["loc"][1:]
    if kind == "json_invalid" or not loc:
        return None
    if kind == "extra_forbidden":
        return "unsupported_parameter" if loc[-1] in UNSUPPORTED else "unknown_parameter"
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith("_type") else "invalid_value"
