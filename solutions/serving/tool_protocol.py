"""The fields of a chat request that are about tools: what may be called, and what must be.

Source: https://platform.openai.com/docs/guides/function-calling; `functions` and `function_call` are its older names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

from ..batching.sampling_params import StructuredOutput
from .errors import RequestError
from .openai_fields import Bool, Request, unless_empty
from .tool_calls.calling import ToolCalling, ToolUse
from .tool_calls.tool_format import NO_PARAMETERS, Function

NO_AUTO = '"auto" tool choice requires a server that was started with --enable-auto-tool-choice'


class FunctionDefinition(Request):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None
    """Accepted either way: arguments always follow the schema."""


class Tool(Request):
    type: Literal["function"] = "function"
    function: FunctionDefinition


@dataclass(slots=True)
class ToolChoice:
    """Whether to call (`mode`: none, auto or required), and which functions: all of them, or those of some names; one that
    `is_named` is called once."""

    mode: str
    names: list[str] | None = None
    is_named: bool = False


def _choice(value: Any) -> ToolChoice:
    """The forms of `tool_choice` and `function_call`."""
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    if isinstance(value, dict):
        named = value.get("function", value) if value.get("type", "function") == "function" else None
        if isinstance(named, dict) and isinstance(named.get("name"), str):
            return ToolChoice("required", [named["name"]], True)
        allowed = value.get("allowed_tools")
        if value.get("type") == "allowed_tools" and isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
            tools = allowed.get("tools")
            names = [_choice(tool).names for tool in tools] if isinstance(tools, list) and tools else [None]
            if None not in names:
                return ToolChoice(allowed["mode"], [name for some in names for name in some or ()])
    raise ValueError('must be "none", "auto", "required" or {"type": "function", "function": {"name": "..."}}')


Choice = Annotated[ToolChoice, PlainValidator(_choice, json_schema_input_type=str | dict[str, Any])]


class ToolFields(Request):
    """The fields of a request."""

    tools: Annotated[list[Tool] | None, BeforeValidator(unless_empty)] = None
    tool_choice: Choice | None = None
    parallel_tool_calls: Bool | None = None
    functions: Annotated[list[FunctionDefinition] | None, BeforeValidator(unless_empty)] = None
    function_call: Choice | None = None

    def tool_use(self, calling: ToolCalling, answer: tuple[str, StructuredOutput] | None) -> ToolUse | None:
        """What the request may call, and how; None: nothing.

        Args:
            answer: the form of an answer without calls, and the field that asks for it.

        Raises:
            RequestError: the fields contradict each other, or ask for what cannot be had.
        """
        is_legacy = self.tools is None and self.functions is not None
        field, chooser = ("functions", "function_call") if is_legacy else ("tools", "tool_choice")
        choice = (self.function_call if is_legacy else self.tool_choice) or ToolChoice("auto")
        if self.tools is None and self.functions is None:
            for name in ("tool_choice", "function_call"):
                if (value := getattr(self, name)) is not None and value.mode != "none":
                    raise RequestError(f"'{name}' is only allowed when '{field}' are specified", name)
            return None
        definitions = self.functions or [] if is_legacy else [tool.function for tool in self.tools or ()]
        functions = [
            _function(each, f"functions[{i}]" if is_legacy else f"tools[{i}].function") for i, each in enumerate(definitions)
        ]
        names = [each.name for each in functions]
        if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise RequestError(f"{field}: the function {twice!r} is there twice", field)
        if missing := next((name for name in choice.names or () if name not in names), None):
            raise RequestError(f"the function {missing!r} of '{chooser}' is not in '{field}'", chooser)
        if choice.mode == "none":
            return None
        if choice.mode == "auto" and not calling.allow_auto:
            raise RequestError(NO_AUTO, chooser)
        if answer is not None and answer[1].kind not in ("json", "json_object"):
            raise RequestError(f"{answer[0]} cannot be combined with {field}", answer[0])
        if choice.names is not None:
            functions = [each for each in functions if each.name in choice.names]
        several = not is_legacy and self.parallel_tool_calls is not False and not choice.is_named
        return ToolUse(
            calling.format, functions, choice.mode == "required", several, None if answer is None else answer[1], is_legacy
        )


def _function(definition: FunctionDefinition, place: str) -> Function:
    """A definition as the engine's; what is not said of its arguments is filled in.

    Raises:
        RequestError: its schema is not that of an object.
    """
    place = f"{place}.parameters"
    if not definition.parameters:
        return Function(definition.name, definition.description, place=place)
    parameters = {"type": "object", **definition.parameters}
    if not parameters.get("properties", True):  # named, and none: so nothing else either
        parameters = NO_PARAMETERS | parameters
    if parameters["type"] != "object":
        raise bad_schema(definition.name, f'it must be of type "object", got {parameters["type"]!r}', place)
    return Function(definition.name, definition.description, parameters, place)


def bad_schema(name: str, why: str, place: str) -> RequestError:
    """Refuse a function, in OpenAI's words."""
    return RequestError(f"{place}: Invalid schema for function '{name}': {why}", place, code="invalid_function_parameters")


def schema_error(use: ToolUse, error: ValueError) -> RequestError | None:
    """What the engine says of a function's schema, for the client; None: it says something else."""
    message = str(error)
    for each in use.functions:
        for start in (f"structured_output: {each.place}: ", f"{each.place}: "):
            if message.startswith(start):
                return bad_schema(each.name, message.removeprefix(start), each.place)
    return None
