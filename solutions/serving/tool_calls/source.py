"""A text that comes in pieces, read from its beginning by parsers that are written as if all of it were there.

A parser is a generator. It yields what it has understood (`Piece`), and None where it needs more text than there is. What it
yields, joined, depends on the text and never on where it was cut.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
MAX_NAME = 256
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NESTING = re.compile(r'\\.|["{}\[\]]', re.DOTALL)


@dataclass(slots=True, frozen=True)
class Piece:
    """What is new in an answer.

    Attributes:
        text: of what the answer says, or of a call's arguments as JSON.
        call: which call of the answer; None: what it says.
        name: of the function, in the first piece of a call.
        is_thought: the model has thought this, and says it to nobody.
    """

    text: str
    call: int | None = None
    name: str | None = None
    is_thought: bool = False


Step = Generator[Piece | None, None, T]


class BrokenError(Exception):
    """The text is no call after all, or ends within one."""


class Source:
    """See the module. `text` is what has come, from `at` on unread; with `has_ended` nothing more will come.

    Args:
        names: of the functions that there are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self.text = ""
        self.at = 0
        self.has_ended = False
        self._call: int | None = None  # where one began whose name is still to come

    def add(self, piece: str) -> None:
        """Append a piece; what nobody needs again is let go."""
        start = self.at if self._call is None else self._call
        self.text = self.text[start:] + piece
        self.at -= start
        self._call = None if self._call is None else 0

    def begin_call(self) -> None:
        """What is read from here on is no call before its name has come (`settle`)."""
        self._call = self.at

    def settle(self) -> None:
        """What was read stays read."""
        self._call = None

    def give_back(self) -> None:
        """What was read since `begin_call` is unread again, unless it has settled."""
        self.at, self._call = self.at if self._call is None else self._call, None

    def more(self) -> Step[None]:
        """Wait for text.

        Raises:
            BrokenError: there will be none.
        """
        if self.has_ended:
            raise BrokenError
        yield None

    def next_of(self, *marks: str) -> Step[str]:
        """The longest of some texts that comes next, which is then read, or "" for none."""
        while not self.has_ended:
            rest = self.text[self.at : self.at + max(map(len, marks))]
            if not any(mark.startswith(rest) and mark != rest for mark in marks):
                break
            yield None
        found = max((mark for mark in marks if self.text.startswith(mark, self.at)), key=len, default="")
        self.at += len(found)
        return found

    def skip_space(self) -> Step[None]:
        """Read white space."""
        while True:
            rest = self.text[self.at :].lstrip()
            self.at = len(self.text) - len(rest)
            if rest or self.has_ended:
                return
            yield None

    def follows(self, *marks: str) -> Step[str]:
        """The same as `next_of`, behind white space."""
        yield from self.skip_space()
        return (yield from self.next_of(*marks))

    def expect(self, *marks: str) -> Step[str]:
        """The same, where one of them has to come.

        Raises:
            BrokenError: something else comes, or nothing.
        """
        found = yield from self.follows(*marks)
        if not found:
            raise BrokenError
        return found

    def until(self, *marks: str, strip: bool = False, needed: bool = False) -> Step[bool]:
        """Give out text up to the first of some marks, which is read; with `strip` without the white space before it. Without
        marks all text that comes. Returns whether one has come.

        Raises:
            BrokenError: a mark is `needed` and has not come.
        """
        while True:
            found = min((at, -len(mark)) for mark in (*marks, "") if (at := self._place(mark)) >= 0)
            has_come = found[1] < 0
            end = (
                found[0] if has_come or (self.has_ended and not needed) else found[0] - max(map(self._begun, marks), default=0)
            )
            stripped = strip and not (self.has_ended and not has_come)
            safe = max(self.at, len(self.text[:end].rstrip())) if stripped else end
            if safe > self.at:
                yield Piece(self.text[self.at : safe])
            self.at = safe
            if has_come:
                self.at = found[0] - found[1]
                return True
            if self.has_ended and needed:
                raise BrokenError
            if self.has_ended:
                return False
            yield None

    def _place(self, mark: str) -> int:
        """Where a mark is, or -1; of no mark the end."""
        return self.text.find(mark, self.at) if mark else len(self.text)

    def _begun(self, mark: str) -> int:
        """How many of the last characters may be the beginning of a mark."""
        most = min(len(mark) - 1, len(self.text) - self.at)
        return next((count for count in range(most, 0, -1) if self.text.endswith(mark[:count])), 0)

    def name_before(self, mark: str) -> Step[str]:
        """A name, and the mark behind it, which is read.

        Raises:
            BrokenError: what comes is too long for a name.
        """
        yield from self.skip_space()
        while (end := self.text.find(mark, self.at)) < 0:
            if len(self.text) - self.at > MAX_NAME:
                raise BrokenError
            yield from self.more()
        name, self.at = self.text[self.at : end].strip(), end + len(mark)
        return name

    def called(self, name: str, call: int) -> Step[None]:
        """A call begins: its name has come.

        Raises:
            BrokenError: there is no such function.
        """
        if name not in self._names:
            raise BrokenError
        self.settle()
        yield Piece("", call, name)

    def string(self) -> Step[str]:
        """The value of a string in JSON."""
        yield from self.skip_space()
        while (found := _STRING.match(self.text, self.at)) is None:
            if self.text[self.at : self.at + 1] not in ("", '"'):
                raise BrokenError
            yield from self.more()
        self.at = found.end()
        try:
            value = json.loads(found[0], strict=False)
        except ValueError as error:
            raise BrokenError from error
        assert isinstance(value, str)
        return value

    def object(self, call: int) -> Step[None]:
        """An object in JSON as it is, piece by piece, as a call's arguments."""
        yield from self.skip_space()
        if not self.text.startswith("{", self.at):
            raise BrokenError
        depth, quoted = 0, False
        while True:
            last = self.at
            for found in _NESTING.finditer(self.text, self.at):
                last, char = found.end(), found[0]
                if char == '"':
                    quoted = not quoted
                elif not quoted and len(char) == 1:
                    depth += 1 if char in "{[" else -1
                    if depth == 0:
                        yield Piece(self.text[self.at : last], call)
                        self.at = last
                        return
            end = len(self.text) - (self.text.endswith("\\") and last < len(self.text))  # an escape whose rest is to come
            if end > self.at:
                yield Piece(self.text[self.at : end], call)
            self.at = end
            yield from self.more()


class Reader(ABC):
    """Reads one text as it comes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._steps = self._read()

    def feed(self, text: str) -> list[Piece]:
        """What a piece of the text brings."""
        self._source.add(text)
        return self._run()

    def finish(self) -> list[Piece]:
        """What the end brings."""
        self._source.has_ended = True
        return self._run()

    def _run(self) -> list[Piece]:
        """The pieces up to where more text is needed."""
        pieces: list[Piece] = []
        for piece in self._steps:
            if piece is None:
                break
            pieces.append(piece)
        return pieces

    @abstractmethod
    def _read(self) -> Step[None]:
        """All of the text."""
        ...


def read_call(source: Source, call: int) -> Step[None]:
    """A call as a JSON object: ``{"name": ..., "arguments": {...}}``; `parameters` is the same as `arguments`."""
    yield from source.expect("{")
    name, held, has_arguments = None, "", False
    while True:
        key = yield from source.string()
        yield from source.expect(":")
        if key == "name":
            name = yield from source.string()
            yield from source.called(name, call)
            if held:
                yield Piece(held, call)
        elif key not in ("arguments", "parameters"):
            yield from source.string()
        else:
            has_arguments = True
            for step in source.object(call):
                if name is None and step is not None:
                    held += step.text
                else:
                    yield step
        if (yield from source.expect(",", "}")) == "}":
            break
    if name is None:
        raise BrokenError
    if not has_arguments:
        yield Piece("{}", call)
