"""What a format of calls consists of, and the parser that all of them share.

A grammar holds an answer to its format, and it is written as a structural tag of XGrammar's: text, and from where a call begins
the rest of it, with arguments that match the function's schema.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...core.grammar.charsets import ALL, inverse, union
from ...core.grammar.ebnf import bracket, quoted
from .source import BrokenError, Piece, Source, Step

Form = dict[str, Any]
"""A part of a structural tag."""


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

    def form(self, functions: Sequence[Function], required: bool, several: bool, other: Form | None) -> Form:
        """The form of an answer.

        Args:
            required: there have to be calls. several: there may be more than one.
            other: the form of an answer without calls; None: any text.
        """
        rest = self.rest(functions, several)
        calls = sequence(either(*map(const, self.heads)), rest)
        if required:
            return calls
        if other is not None:
            return either(calls, other)
        if self.in_text:
            return {"type": "dispatch", "rules": [(head, rest) for head in self.heads], "loop": False}
        return either(calls, not_beginning(self.marks(functions)))


class ToolParser:
    """Reads one answer as it comes.

    Args:
        marks: what calls begin with. in_text: whether text may come before; otherwise the answer begins with them.

    Attributes:
        num_calls: that have begun.
        is_whole: all of them have ended.
    """

    def __init__(self, tool_format: ToolFormat, functions: Sequence[Function], in_text: bool, marks: Sequence[str]) -> None:
        self._format, self._functions = tool_format, functions
        self._in_text, self._marks = in_text, tuple(marks)
        self._source = Source(each.name for each in functions)
        self._steps = self._read()
        self.num_calls = 0
        self.is_whole = False

    def feed(self, text: str) -> list[Piece]:
        """What a piece of the answer's text brings."""
        self._source.add(text)
        return self._run()

    def finish(self) -> list[Piece]:
        """What the end brings."""
        self._source.has_ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        pieces: list[Piece] = []
        for piece in self._steps:
            if piece is None:
                break
            self.num_calls += piece.name is not None
            pieces.append(piece)
        return pieces

    def _read(self) -> Step[None]:
        source = self._source
        if self._in_text:
            (mark,) = self._marks
            if not (yield from source.until(mark, strip=True)):
                return
            source.at -= len(mark)
        elif mark := (yield from source.next_of(*self._marks)):
            source.at -= len(mark)
        else:
            yield from source.until("")
            return
        source.begin_call()
        try:
            yield from self._format.read(source, self._functions)
            self.is_whole = True
            source.settle()
            yield from source.skip_space()
        except BrokenError:
            if self.num_calls and source.has_ended:  # cut short where one more was to begin
                return
            source.give_back()
        yield from source.until("")
