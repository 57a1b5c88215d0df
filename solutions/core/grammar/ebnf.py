"""Rules of a grammar in XGrammar's EBNF, and how JSON writes the characters of a text.

A character is written as itself. Quotation marks and backslashes need a backslash, and other characters may have one where JSON
has a short form. Control characters and those beyond ASCII may be ``\\uXXXX``, or two of these beyond the first 65,536. So any
reader accepts each answer, and one character of the value counts as one, however it is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .automata import Automaton
from .charsets import ALL, CharSet, common, inverse, union

Part = str | tuple[str] | tuple[str, int, int | None]
"""EBNF as it is; or a rule by its name; or a rule so many times."""

MAX_PARTS = 120_000
"""Most parts of all rules together; a schema that needs more is too costly."""
BLOCK = 32
"""Characters that are counted one by one; larger numbers are counted in blocks. A rule for each character is fast to follow but
slow to compile, a repetition of a rule the other way round."""
SHORT = {'"': '"', "\\": "\\", "/": "/", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t"}
RAW = inverse(union(((0, 0x1F), (34, 34), (92, 92))))
AS_NUMBER = union(((0, 0x1F), (0x7F, 0xD7FF), (0xE000, 0x10FFFF)))
QUOTE = '"\\""'


def quoted(text: str) -> str:
    """A text as a literal."""
    return '"' + "".join(_escaped(char, '"\\') for char in text) + '"'


def _escaped(char: str, special: str) -> str:
    code = ord(char)
    if 0x20 <= code < 0x7F:
        return f"\\u{code:04x}" if char in special else char
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def bracket(chars: CharSet) -> str:
    """A set of characters as a class."""
    ends = [(_escaped(chr(low), '[]^-\\"'), _escaped(chr(high), '[]^-\\"')) for low, high in chars]
    return "[" + "".join(low if low == high else f"{low}-{high}" for low, high in ends) + "]"


def json_literal(text: str) -> str:
    """A JSON text as EBNF: as it is, or with all that is not ASCII by number."""
    if text.isascii():
        return quoted(text)
    by_number = "".join(char if char.isascii() else "".join(f"\\u{unit:04x}" for unit in _units(ord(char))) for char in text)
    return f"({quoted(text)} | {quoted(by_number)})"


def _units(code: int) -> tuple[int, ...]:
    if code < 0x10000:
        return (code,)
    return 0xD800 + ((code - 0x10000) >> 10), 0xDC00 + (code & 0x3FF)


def _hex_ranges(low: int, high: int, width: int) -> list[str]:
    """Hexadecimal digits, so many, from one number to another."""
    if width == 0:
        return [""]
    size = 16 ** (width - 1)
    first, last = low // size, high // size
    if first == last:
        return [_hex(first, first) + rest for rest in _hex_ranges(low % size, high % size, width - 1)]
    found = []
    if low % size:
        found += [_hex(first, first) + rest for rest in _hex_ranges(low % size, size - 1, width - 1)]
        first += 1
    tail = []
    if high % size != size - 1:
        tail = [_hex(last, last) + rest for rest in _hex_ranges(0, high % size, width - 1)]
        last -= 1
    if first <= last:
        found.append(_hex(first, last) + " [0-9a-fA-F]" * (width - 1))
    return found + tail


def _hex(low: int, high: int) -> str:
    digits = "".join(f"{digit:x}{digit:X}" if digit > 9 else str(digit) for digit in range(low, high + 1))
    return f" [{digits}]"


def by_number(chars: CharSet) -> list[str]:
    """What stands behind ``\\u`` for each character of a set."""
    found = []
    for low, high in common(chars, ((0, 0xFFFF),)):
        found += _hex_ranges(low, high, 4)
    for low, high in common(chars, ((0x10000, 0x10FFFF),)):
        first, last = _units(low), _units(high)
        rows = [(first[0], last[0], first[1], last[1])]
        if first[0] < last[0]:
            rows = [(first[0], first[0], first[1], 0xDFFF), (last[0], last[0], 0xDC00, last[1])]
            if last[0] - first[0] > 1:
                rows.append((first[0] + 1, last[0] - 1, 0xDC00, 0xDFFF))
        for top, top_last, bottom, bottom_last in rows:
            lows = " | ".join(_hex_ranges(bottom, bottom_last, 4))
            found += [f'{one} "\\\\u" ({lows})' for one in _hex_ranges(top, top_last, 4)]
    return found


class Rules:
    """Rules under names of their own; equal ones are made once.

    Raises:
        ValueError: from `add`: there are too many.
    """

    def __init__(self) -> None:
        self._rules: dict[str, Sequence[Sequence[Part]]] = {}
        self._made: dict[object, str] = {}
        self._chars: dict[CharSet, list[list[Part]]] = {}
        self._parts = 0

    def name(self, key: object) -> tuple[str, bool]:
        """The name of the rule for a key, and whether the rule is still to be added."""
        fresh = key not in self._made
        if fresh:
            self._made[key] = f"r{len(self._made)}"
        return self._made[key], fresh

    def add(self, name: str, choices: Sequence[Sequence[Part]]) -> str:
        """Add a rule; no choice at all means no text."""
        self._parts += sum(1 + len(choice) for choice in choices)
        if self._parts > MAX_PARTS:
            raise ValueError(f"its grammar has more than {MAX_PARTS} parts; make the schema smaller, or its numbers")
        self._rules[name] = choices
        return name

    def char(self, chars: CharSet) -> list[list[Part]]:
        """How JSON writes a character of a set, as choices."""
        if chars in self._chars:
            return self._chars[chars]
        found: list[list[Part]] = []
        if raw := common(chars, RAW):
            found.append([bracket(raw)])
        short = "".join(letter for char, letter in SHORT.items() if common(chars, ((ord(char), ord(char)),)))
        if short:
            found.append(['"\\\\"', bracket(union(*(((ord(letter), ord(letter)),) for letter in short)))])
        if numbered := common(chars, AS_NUMBER):
            name, fresh = self.name(("number", numbered))
            if fresh:
                self.add(name, [[text.strip()] for text in by_number(numbered)])
            found.append(['"\\\\u"', (name,)])
        self._chars[chars] = found
        return found

    def automaton(self, language: Automaton, quotes: bool) -> str:
        """A rule for the texts of an automaton, with quotation marks and escapes, or as they are."""
        start, fresh = self.name((language, quotes))
        if not fresh:
            return start
        names = [self.name((start, state))[0] for state in range(len(language.edges))]  # to hash the whole each time is slow
        for state, name in enumerate(names):
            choices: list[Sequence[Part]] = [[QUOTE if quotes else '""']] if language.final[state] else []
            for chars, target in language.edges[state]:
                ways = self.char(chars) if quotes else [[bracket(chars)]]
                choices += [[*way, (names[target],)] for way in ways]
            self.add(name, choices)
        return self.add(start, [[QUOTE, (names[0],)] if quotes else [(names[0],)]])

    def counted(self, low: int, high: int | None, chars: CharSet = ALL) -> str:
        """A rule for the texts of `low` to `high` of some characters, in quotation marks."""
        name, fresh = self.name(("counted", low, high, chars))
        if not fresh:
            return name
        blocks, more = divmod(low, BLOCK)
        parts: list[Part] = [QUOTE]
        if blocks:
            parts.append((self._exactly(BLOCK, chars), blocks, blocks))
        if more:
            parts.append((self._exactly(more, chars),))
        if high is None:
            rest, fresh = self.name(("rest", chars))
            if fresh:  # a rule that calls itself last is followed faster than one that is repeated
                self.add(rest, [[QUOTE], *([*way, (rest,)] for way in self.char(chars))])
            return self.add(name, [[*parts, (rest,)]])
        if high > low:
            blocks, more = divmod(high - low, BLOCK)
            if blocks > 1:
                parts.append((self._exactly(BLOCK, chars), 0, blocks - 1))
            parts.append((self._at_most(more + BLOCK if blocks else more, chars),))
        return self.add(name, [[*parts, QUOTE]] if high >= low else [])

    def _exactly(self, count: int, chars: CharSet) -> str:
        name, fresh = self.name(("exactly", count, chars))
        if fresh:
            rest: list[Part] = [(self._exactly(count - 1, chars),)] if count > 1 else []
            self.add(name, [[*way, *rest] for way in self.char(chars)])
        return name

    def _at_most(self, count: int, chars: CharSet) -> str:
        name, fresh = self.name(("at most", count, chars))
        if fresh:
            rest: list[Part] = [(self._at_most(count - 1, chars),)] if count else []
            self.add(name, [['""'], *([*way, *rest] for way in self.char(chars) if count)])
        return name

    def text(self, root: str) -> str:
        """All rules that a text can be made of, as EBNF.

        Raises:
            ValueError: there is no text.
        """
        useful: set[str] = set()
        users: dict[str, set[str]] = {}
        for name, choices in self._rules.items():
            for part in itertools.chain(*choices):
                if isinstance(part, tuple):
                    users.setdefault(part[0], set()).add(name)
        stack = list(self._rules)
        while stack:
            name = stack.pop()
            if name not in useful and any(self._has_text(choice, useful) for choice in self._rules[name]):
                useful.add(name)
                stack.extend(users.get(name, ()))
        if root not in useful:
            raise ValueError("there is no value of this form")
        lines, stack, seen = [f"root ::= {root}"], [root], {root}
        while stack:
            name = stack.pop()
            choices = [
                [part for part in choice if isinstance(part, str) or (part[0] in useful and part[1:] != (0, 0))]
                for choice in self._rules[name]
                if self._has_text(choice, useful)
            ]
            fresh = {part[0] for choice in choices for part in choice if isinstance(part, tuple)} - seen
            seen |= fresh
            stack.extend(sorted(fresh))
            printed = dict.fromkeys(" ".join(map(_print, choice)) or '""' for choice in choices)
            lines.append(f"{name} ::= {' | '.join(f'({choice})' for choice in printed)}")
        return "\n".join(lines)

    def _has_text(self, choice: Sequence[Part], useful: set[str]) -> bool:
        return all(isinstance(part, str) or self._can_be(part, useful) for part in choice)

    def _can_be(self, part: tuple[str] | tuple[str, int, int | None], useful: set[str]) -> bool:
        """Whether a rule can be had, so many times."""
        _, low, high = part if len(part) == 3 else (*part, 1, 1)
        return (part[0] in useful or low == 0) and (high is None or low <= high)


def _print(part: Part) -> str:
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return part[0]
    name, low, high = part
    if high is None:
        return {0: f"{name}*", 1: f"{name}+"}.get(low, f"{name}{{{low},}}")
    return f"{name}{{{low},{high}}}"
