"""Turns a grammar of Lark into XGrammar's EBNF: the texts that its rule ``start`` has.

Lark first cuts a text into terminals, each as long as it can be; here a text is allowed if it can be cut in any way.
Priorities, aliases, and ``?`` and ``!`` before a rule change what Lark makes of a text, not which texts there are. What
``%ignore`` names may stand before each terminal of a rule, and at the end. Of other grammars only Lark's ``common`` can be
imported; templates, ``%declare`` and the flags of regular expressions are refused.

Source: https://lark-parser.readthedocs.io/en/stable/grammar.html
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import NamedTuple

from .ebnf import Part, Rules, bracket, quoted
from .ecma_regex import whole

COMMON = r"""
DIGIT: "0".."9"
HEXDIGIT: "a".."f" | "A".."F" | DIGIT
INT: DIGIT+
SIGNED_INT: ["+" | "-"] INT
DECIMAL: INT "." INT? | "." INT
_EXP: ("e" | "E") SIGNED_INT
FLOAT: INT _EXP | DECIMAL _EXP?
SIGNED_FLOAT: ["+" | "-"] FLOAT
NUMBER: FLOAT | INT
SIGNED_NUMBER: ["+" | "-"] NUMBER
ESCAPED_STRING: /"([^"\\\n]|\\[^\n])*"/
LCASE_LETTER: "a".."z"
UCASE_LETTER: "A".."Z"
LETTER: UCASE_LETTER | LCASE_LETTER
WORD: LETTER+
CNAME: ("_" | LETTER) ("_" | LETTER | DIGIT)*
WS_INLINE: /[ \t]/+
WS: /[ \t\f\r\n]/+
CR: /\r/
LF: /\n/
NEWLINE: (CR? LF)+
SH_COMMENT: /#[^\n]*/
CPP_COMMENT: /\/\/[^\n]*/
C_COMMENT: /\/\*([^*]|\*+[^*\/])*\*+\//
SQL_COMMENT: /--[^\n]*/
"""
"""The terminals of Lark's ``common``."""
MAX_TIMES = 1_000
_SIGN = re.compile(r"^[?!]*\w+(\.-?\d+)?\s*:(?!:=)|^%(import|ignore|declare|override|extend)\b", re.MULTILINE)
"""A rule as Lark writes it, or one of its directives."""
_TOKEN = re.compile(
    r'(?P<space>[ \t\f\r]+|//[^\n]*|\#[^\n]*)|(?P<line>\n)|(?P<string>"(?:\\.|[^"\\\n])*"i?)'
    r"|(?P<regex>/(?!/)(?:\\.|[^/\\\n])+/[a-z]*)|(?P<number>-?[0-9]+(?!\w))|(?P<name>\w+)"
    r"|(?P<mark>->|\.\.|[][?*+~()|:.!%,{}])"
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "\\": "\\", '"': '"', "/": "/"}
Choices = list[list[Part]]


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


def is_lark(text: str) -> bool:
    """Whether a grammar is Lark's and not EBNF."""
    return "::=" not in text and _SIGN.search(text) is not None


@functools.lru_cache(64)
def to_ebnf(text: str) -> str:
    """The grammar in EBNF.

    Raises:
        ValueError: it is not one, has what cannot be had here, or allows no text; the message says where.
    """
    return _Reader(_tokens(text), Rules()).grammar()


def _tokens(text: str) -> list[_Token]:
    """The tokens of a grammar. The end of a line is one, unless the next line goes on with another choice."""
    found: list[_Token] = []
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"line {line}: {text[at : at + 10]!r} is not of a grammar of Lark")
        kind = match.lastgroup or ""
        if match[0] == "|" and found and found[-1].kind == "line":
            found.pop()
        if kind not in ("space", "line") or (kind == "line" and found and found[-1].kind != "line"):
            found.append(_Token(kind, match[0], line))
        line += kind == "line"
        at = match.end()
    return [*found, _Token("line", "\n", line), _Token("end", "", line)]


class _Reader:
    """Reads one grammar, statement by statement, into rules whose names begin with `prefix`."""

    def __init__(self, tokens: list[_Token], rules: Rules, prefix: str = "rule_") -> None:
        self._tokens = tokens
        self._at = 0
        self._rules, self._prefix = rules, prefix
        self._defined: set[str] = set()
        self._used: dict[str, int] = {"start": 1}  # name → a line that needs it
        self._ignored: Choices = []
        self._ignores = any(a.text == "%" and b.text == "ignore" for a, b in itertools.pairwise(tokens))
        self._in_rule = False

    def grammar(self) -> str:
        self._statements()
        for name, line in self._used.items():
            if name not in self._defined:
                raise ValueError(f"line {line}: there is no rule {name!r}")
        if self._ignores:
            self._rules.add("ignored", self._ignored)
        end: list[Part] = [("ignored", 0, None)] if self._ignores else []
        self._rules.add("all", [[(self._named("start"),), *end]])
        try:
            return self._rules.text("all")
        except ValueError:
            raise ValueError("the rule 'start' has no text") from None

    def _statements(self) -> None:
        while self._next.kind != "end":
            if self._take("line"):
                continue
            if self._take("mark", "%"):
                self._directive()
            else:
                self._rule()
            self._need("line")

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, kind: str, *texts: str) -> str:
        """The next token, if it is such a one, and then it is read; or nothing."""
        token = self._next
        if token.kind != kind or (texts and token.text not in texts):
            return ""
        self._at += 1
        return token.text

    def _need(self, kind: str, text: str | None = None) -> str:
        """The same, where one has to come."""
        token = self._next
        if not (found := self._take(kind, *([] if text is None else [text]))):
            there = "the end" if token.kind in ("line", "end") else repr(token.text)
            what = repr(text) if text else "the end of the line" if kind == "line" else f"a {kind}"
            raise ValueError(f"line {token.line}: {what} is missing before {there}")
        return found

    def _refuse(self, what: str) -> ValueError:
        return ValueError(f"line {self._tokens[self._at - 1].line}: {what} cannot be had here")

    def _directive(self) -> None:
        name = self._need("name")
        if name == "ignore":
            self._in_rule = False
            self._ignored += self._choices()
        elif name == "import":
            self._import()
        else:
            raise self._refuse(f"%{name}")

    def _import(self) -> None:
        if self._need("name") != "common":
            raise self._refuse("an import of anything but common")
        if not self._take("mark", "("):
            self._need("mark", ".")
            name = self._need("name")
            self._define_common(name, self._need("name") if self._take("mark", "->") else name)
            return
        while not self._take("mark", ")"):
            name = self._need("name")
            self._define_common(name, name)
            self._take("mark", ",")

    def _define_common(self, name: str, own_name: str) -> None:
        common = _Reader(_tokens(COMMON), self._rules, "common_")
        common._statements()
        if name not in common._defined:
            raise self._refuse(f"common.{name}")
        self._define(own_name, [[(common._named(name),)]])

    def _define(self, name: str, choices: Choices) -> None:
        if name in self._defined:
            raise ValueError(f"line {self._tokens[self._at - 1].line}: {name!r} is defined twice")
        self._defined.add(name)
        self._rules.add(self._named(name), choices)

    def _rule(self) -> None:
        while self._take("mark", "?", "!"):
            pass
        name = self._need("name")
        if self._take("mark", "{"):
            raise self._refuse("a template")
        if self._take("mark", "."):
            self._need("number")
        self._need("mark", ":")
        self._in_rule = not _is_terminal(name)
        self._define(name, self._choices())

    def _choices(self) -> Choices:
        """What stands on the right of a rule, or in brackets."""
        choices = [self._sequence()]
        while self._take("mark", "|"):
            self._take("line")
            choices.append(self._sequence())
        return choices

    def _sequence(self) -> list[Part]:
        parts: list[Part] = []
        while (token := self._next).kind in ("string", "regex", "name") or token.text in ("(", "["):
            parts.append(self._times(self._atom()))
        if self._take("mark", "->"):
            self._need("name")
        return parts or ['""']

    def _times(self, part: Part) -> Part:
        """A part, as often as what stands behind it says."""
        if mark := self._take("mark", "?", "*", "+"):
            low, high = {"?": (0, 1), "*": (0, None), "+": (1, None)}[mark]
        elif self._take("mark", "~"):
            low = int(self._need("number"))
            high = int(self._need("number")) if self._take("mark", "..") else low
            if not 0 <= low <= high <= MAX_TIMES:
                raise self._refuse(f"{low} to {high} times")
        else:
            return part
        return (self._rule_of([[part]]), low, high)

    def _atom(self) -> Part:
        if mark := self._take("mark", "(", "["):
            inner = self._choices()
            self._need("mark", ")" if mark == "(" else "]")
            return (self._rule_of(inner),) if mark == "(" else (self._rule_of(inner), 0, 1)
        if name := self._take("name"):
            if self._take("mark", "{"):
                raise self._refuse("a template")
            self._used.setdefault(name, self._tokens[self._at - 1].line)
            return self._spaced((self._named(name),), _is_terminal(name))
        if pattern := self._take("regex"):
            return self._spaced((self._regex(pattern),), True)
        text = self._need("string")
        if not self._take("mark", ".."):
            return self._spaced(_string(text), True)
        first, last = _unescaped(text[1:-1]), _unescaped(self._need("string")[1:-1])
        if len(first) != 1 or len(last) != 1 or first > last:
            raise self._refuse(f"the range from {first!r} to {last!r}")
        return self._spaced(bracket(((ord(first), ord(last)),)), True)

    def _spaced(self, part: Part, is_terminal: bool) -> Part:
        """A part of a rule with what is ignored before it, if it is a terminal."""
        if not is_terminal or not self._in_rule or not self._ignores:
            return part
        return (self._rule_of([[("ignored", 0, None), part]]),)

    def _named(self, name: str) -> str:
        """What a rule is called in EBNF."""
        return self._prefix + "".join(char if char.isascii() else f"U{ord(char)}" for char in name)

    def _rule_of(self, choices: Choices) -> str:
        """The name of a rule with these choices."""
        name, fresh = self._rules.name(tuple(map(tuple, choices)))
        return self._rules.add(name, choices) if fresh else name

    def _regex(self, text: str) -> str:
        pattern, _, flags = text[1:].rpartition("/")
        if flags:
            raise self._refuse(f"a regular expression with the flags {flags!r}")
        pattern = pattern.replace(r"\/", "/")
        try:
            return self._rules.automaton(whole(pattern), False)
        except ValueError as error:
            raise ValueError(f"line {self._tokens[self._at - 1].line}: /{pattern}/: {error}") from None


def _is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper()


def _string(text: str) -> str:
    """A text in quotation marks as EBNF; with an i behind them, in letters of either case."""
    if not text.endswith("i"):
        return quoted(_unescaped(text[1:-1]))
    sets = [sorted({char.lower(), char.upper()}) for char in _unescaped(text[1:-2])]
    return (
        " ".join(
            bracket(tuple((ord(each), ord(each)) for each in chars))
            if all(len(each) == 1 for each in chars)
            else quoted(chars[0])
            for chars in sets
        )
        or '""'
    )


def _unescaped(text: str) -> str:
    def char(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        return chr(int(code, 16)) if code else _SHORT.get(match[4], match[0])

    return _ESCAPE.sub(char, text)
