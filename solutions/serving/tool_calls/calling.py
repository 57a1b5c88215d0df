"""How this server's model calls tools, and what one request makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...batching.sampling_params import StructuredOutput
from .conversation import in_words
from .formats import FORMATS, format_of, writes_tools
from .tool_format import Form, Function, ToolFormat, ToolParser, as_form

START = r"\A"


@dataclass(slots=True)
class ToolUse:
    """What a request may call, and how.

    Attributes:
        required: the answer has to be calls. several: it may be more than one.
        answer: the form of an answer without calls; None: any text.
        is_legacy: the request and its answer say `functions` and `function_call`.
    """

    format: ToolFormat
    functions: list[Function]
    required: bool
    several: bool
    answer: StructuredOutput | None = None
    is_legacy: bool = False

    def form(self, unless: Sequence[str] = ()) -> Form:
        """The form of the answer; a text without calls has nothing of `unless`.

        Raises:
            ValueError: a function's schema cannot be had in this format; the message begins with its place.
        """
        other = None if self.answer is None else as_form(self.answer)
        return self.format.form(self.functions, self.required, self.several, other, unless)

    @property
    def in_text(self) -> bool:
        """Whether calls may follow a text."""
        return self.format.in_text and self.answer is None

    @property
    def marks(self) -> tuple[str, ...]:
        """What calls begin with."""
        return self.format.marks(self.functions) if self.answer is None else self.format.openings(self.functions)

    def beginning(self, before: str = START) -> str:
        """What calls begin with, as a regular expression, where they may begin behind what `before` matches."""
        marks = f"(?:{'|'.join(map(re.escape, self.marks))})"
        return marks if self.in_text else rf"{before}\s*{marks}"

    def parser(self) -> ToolParser:
        """What reads one answer."""
        return ToolParser(self.format, self.functions, self.in_text, self.marks)


class ToolCalling:
    """How a server's model calls tools.

    Args:
        tokenizer: the engine's, or None. parser: a name of `FORMATS`; "auto": what the chat template calls for.
        allow_auto: the model may decide whether to call.

    Attributes:
        format: how calls are written. is_native: the chat template tells the model of tools; otherwise `in_words` does.
    """

    def __init__(self, tokenizer: Any, parser: str = "auto", allow_auto: bool = True) -> None:
        writes = tokenizer is not None and writes_tools(tokenizer)
        known = format_of(tokenizer) if writes else None
        self.format = (known or FORMATS["json"])() if parser == "auto" else FORMATS[parser]()
        self.is_native = writes and (known is not None or parser != "auto")
        self.allow_auto = allow_auto

    def conversation(
        self, messages: list[dict[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the model's chat template takes them."""
        if not functions and not any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            return messages, None
        if not self.is_native:
            return in_words(messages, functions, self.format), None
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["id"] = self.format.id_in_history(call["id"])
            if "tool_call_id" in message:
                message["tool_call_id"] = self.format.id_in_history(message["tool_call_id"])
        return messages, [each.as_tool() for each in functions] or None
