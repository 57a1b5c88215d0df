"""What a format of calls consists of, and the parser that all of them share.

A grammar holds an answer to its format, and it is written as a structural tag of XGrammar's: text, and from where a call begins
the rest of it, with arguments that match the function's schema.
"""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...batching.sampling_params import StructuredOutput
from ...core.grammar.charsets import ALL, inverse, union
from ...core.grammar.ebnf import bracket, quoted
from ...core.grammar.structural_tag import tag_format
from .source import BrokenError, Reader, Source, Step

Form = dict[str, Any]
"""A part of a structural tag."""


SPACES = " \t\r\n"
SPACE: Form = {"type": "regex", "pattern": r"[ \t\r\n]*"}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(slots=True)
class Function:
    """What may be called; `parameters` is the JSON schema of an object, and `place` where the request has it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=NO_PARAMETERS.copy)
    place: str = "parameters"

    @property
    def arguments(self) -> Form:
        """All that it may be called with, as JSON."""
        return schema(self.parameters, self.place)

    def as_tool(self) -> dict[str, Any]:
        """In OpenAI's form, for a chat template."""
        described = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": self.parameters}}


def const(text: str) -> Form:
    return {"type": "const_string", "value": text}


def sequence(*parts: Form) -> Form:
    return {"type": "sequence", "elements": list(parts)}


def either(*forms: Form) -> Form:
    return forms[0] if len(forms) == 1 else {"type": "or", "elements": list(forms)}


def schema(value: Any, place: str = "response_format") -> Form:
    """JSON that matches a schema; an error in it begins with its place."""
    return {"type": "json_schema", "json_schema": value, "place": place}


def grammar(rules: str) -> Form:
    return {"type": "grammar", "grammar": rules}


def as_form(wanted: StructuredOutput) -> Form:
    """A form of answers as a part of a structural tag."""
    kind, text = wanted.kind, wanted.definition
    if kind in ("json", "json_object"):
        made = schema(json.loads(text) if text else {"type": "object"}, "the json is not valid")
        return made if wanted.white_space is None else {**made, "white_space": wanted.white_space}
    if kind == "regex":
        return {"type": "regex", "pattern": text}
    if kind == "choice":
        return either(*map(const, json.loads(text)))
    if kind == "structural_tag":
        return tag_format(text)
    return grammar(text)


def as_output(form: Form) -> StructuredOutput:
    """The same the other way."""
    return StructuredOutput("structural_tag", json.dumps({"type": "structural_tag", "format": form}))


def listed(forms: Sequence[Form], separator: str, several: bool) -> Form:
    """One of the forms, or with `several` more behind it, with a separator between them."""
    one = either(*forms)
    if not several:
        return one
    return sequence(one, {"type": "star", "content": sequence(const(separator), one)})


def not_beginning(marks: Sequence[str]) -> Form:
    """All texts that do not begin with one of the marks."""
    rules = [f"any ::= {bracket(ALL)}*"]

    def add(name: str, rests: list[str]) -> None:
        after: dict[str, list[str]] = {}
        for rest in rests:
            after.setdefault(rest[0], []).append(rest[1:])
        others = inverse(union(*(((ord(char), ord(char)),) for char in after)))
        choices = ['""', f"{bracket(others)} any"]
        for number, (char, more) in enumerate(after.items()):
            if "" not in more:
                choices.append(f"{quoted(char)} {name}n{number}")
                add(f"{name}n{number}", more)
        rules.append(f"{name} ::= {' | '.join(f'({choice})' for choice in choices)}")

    add("root", list(marks))
    return grammar("\n".join(reversed(rules)))


class ToolFormat(ABC):
    """How a family of models writes calls.

    Attributes:
        name: of the flag ``--tool-call-parser``.
        heads: what calls begin with.
        in_text: calls may follow a text; otherwise an answer begins with them or has none.
        has_special_tokens: its marks are tokens that a text usually leaves out.
    """

    name: ClassVar[str]
    heads: ClassVar[tuple[str, ...]]
    in_text: ClassVar[bool] = False
    has_special_tokens: ClassVar[bool] = False

    @abstractmethod
    def rest(self, functions: Sequence[Function], several: bool) -> Form:
        """The form of the calls behind one of the heads: of one, or as many as the model likes."""
        ...

    @abstractmethod
    def read(self, source: Source, functions: Sequence[Function]) -> Step[None]:
        """Read the calls, from the mark on.

        Raises:
            BrokenError: they are none, or end too early.
        """
        ...

    @abstractmethod
    def write(self, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
        """Calls as the model would write them: names and arguments."""
        ...

    def marks(self, functions: Sequence[Function]) -> tuple[str, ...]:
        """What calls begin with and no other text of the model does."""
        return self.heads

    def openings(self, functions: Sequence[Function]) -> tuple[str, ...]:
        """What calls begin with and no JSON of another form does."""
        return self.marks(functions)

    def call_id(self) -> str:
        """A new id for a call."""
        return f"call_{uuid.uuid4().hex[:24]}"

    def id_in_history(self, call_id: str) -> str:
        """An id, whoever has made it, as the model's template takes it."""
        return call_id

    def form(
        self, functions: Sequence[Function], required: bool, several: bool, other: Form | None, unless: Sequence[str] = ()
    ) -> Form:
        """The form of an answer.

        Args:
            required: there have to be calls. several: there may be more than one.
            other: the form of an answer without calls; None: any text, without those of `unless`.
        """
        rest = self.rest(functions, several)
        calls = sequence(either(*map(const, self.heads)), rest)
        if required:
            return calls
        if other is not None:
            return either(calls, other)
        if self.in_text:
            rules = [(head, rest) for head in self.heads]
            return {"type": "dispatch", "rules": rules, "loop": False, "excludes": list(unless)}
        return sequence(SPACE, either(calls, not_beginning((*self.marks(functions), *SPACES, *unless))))


class ToolParser(Reader):
    """Reads one answer as it comes.

    Args:
        marks: what calls begin with. in_text: whether text may come before; otherwise the answer begins with them, perhaps
            behind white space.

    Attributes:
        num_calls: that have begun.
        is_whole: all of them have ended.
    """

    def __init__(self, tool_format: ToolFormat, functions: Sequence[Function], in_text: bool, marks: Sequence[str]) -> None:
        self._format, self._functions = tool_format, functions
        self._in_text, self._marks = in_text, tuple(marks)
        self.num_calls = 0
        self.is_whole = False
        super().__init__(Source(each.name for each in functions))

    def _read(self) -> Step[None]:
        source = self._source
        if self._in_text:
            (mark,) = self._marks
            if not (yield from source.until(mark, strip=True)):
                return
            source.at -= len(mark)
            source.begin_call()
        else:
            source.begin_call()
            mark = yield from source.follows(*self._marks)
            if not mark:
                source.give_back()
                yield from source.until()
                return
            source.at -= len(mark)
        try:
            for step in self._format.read(source, self._functions):
                self.num_calls += step is not None and step.name is not None
                yield step
            self.is_whole = True
            source.settle()
            yield from source.skip_space()
        except BrokenError:
            if self.num_calls and source.has_ended:  # cut short where one more was to begin
                return
            source.give_back()
        yield from source.until()
