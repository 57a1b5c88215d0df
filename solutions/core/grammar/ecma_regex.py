"""Regular expressions as JSON schemas use them (ECMA 262), read into `automata.Regex`.

Validators disagree about a few things: whether ``\\d`` is ten digits (ECMA) or those of every script (Python), and how ``.``
and ``$`` treat line breaks. So each pattern has two readings. Texts of the narrow one match in every validator; texts outside
the wide one match in none. An answer that must match follows the narrow reading; one that must not match avoids the wide one.

Source: ECMA 262, section 22.2, with annex B; patterns are read as if under the flag u.
"""

from __future__ import annotations

import functools
import unicodedata

from .automata import (
    ANY_TEXT,
    BEGIN,
    EMPTY,
    END,
    Automaton,
    Regex,
    build,
    cat,
    complement,
    either,
    intersect,
    one_of,
    repeat,
)
from .charsets import ALL, CharSet, common, inverse, union

MAX_REPEAT = 10_000
DIGITS: CharSet = ((48, 57),)
WORD: CharSet = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACES = union(
    *(((ord(char), ord(char)),) for char in "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff"), ((0x2000, 0x200A),)
)
OTHER_SPACES: CharSet = ((0x1C, 0x1F), (0x85, 0x85))
"""What Python takes for white space and ECMA does not."""
BEYOND_ASCII: CharSet = ((0x80, 0xD7FF), (0xE000, 0x10FFFF))
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}


@functools.cache
def _all_digits() -> CharSet:
    return union(tuple((code, code) for code in range(0x110000) if unicodedata.category(chr(code)) == "Nd"))


def _class(letter: str, wide: bool) -> CharSet:
    """The characters of ``\\d``, ``\\w``, ``\\s`` and their opposites, in one of the two readings."""
    if letter.isupper():
        return inverse(_class(letter.lower(), not wide))
    if letter == "d":
        return _all_digits() if wide else DIGITS
    if letter == "w":
        return union(WORD, BEYOND_ASCII) if wide else WORD
    return union(SPACES, OTHER_SPACES) if wide else union(tuple(pair for pair in SPACES if pair[0] != 0xFEFF))


class _Reader:
    """Reads one pattern; `at` is the place of the next character."""

    def __init__(self, text: str, wide: bool) -> None:
        self.text, self.wide, self.at, self.depth = text, wide, 0, 0

    def fail(self, why: str) -> ValueError:
        return ValueError(f"{why} at character {self.at}")

    def peek(self, *words: str) -> bool:
        return any(self.text.startswith(word, self.at) for word in words)

    def take(self, word: str) -> bool:
        if found := self.peek(word):
            self.at += len(word)
        return found

    def alternatives(self) -> Regex:
        self.depth += 1
        if self.depth > 50:
            raise self.fail("more than 50 groups inside each other")
        found = [self.sequence()]
        while self.take("|"):
            found.append(self.sequence())
        self.depth -= 1
        return found[0] if len(found) == 1 else either(*found)

    def sequence(self) -> Regex:
        parts: list[Regex] = []
        while self.at < len(self.text) and not self.peek("|", ")"):
            part = self.atom()
            parts.append(self.quantified(part))
        return parts[0] if len(parts) == 1 else cat(*parts)

    def quantified(self, part: Regex) -> Regex:
        bounds = self.quantifier()
        if bounds is None:
            return part
        if part in (BEGIN, END):
            raise self.fail("a repeated ^ or $ is not supported")
        low, high = bounds
        if high is not None and high < low:
            raise self.fail("a repetition whose bounds are the wrong way round")
        if max(low, high or 0) > MAX_REPEAT:
            raise self.fail(f"more than {MAX_REPEAT} repetitions")
        self.take("?")  # lazy: the same texts
        if self.peek("*", "+", "?") or self.quantifier() is not None:
            raise self.fail("a repetition of a repetition")
        return repeat(part, low, high)

    def quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        end = self.text.find("}", self.at)
        if not self.peek("{") or end < 0:
            return None
        low, comma, high = self.text[self.at + 1 : end].partition(",")
        if not (low.isascii() and low.isdigit()) or (high and not (high.isascii() and high.isdigit())):
            return None  # an ordinary brace
        self.at = end + 1
        if max(len(low), len(high)) > 9:
            raise self.fail(f"more than {MAX_REPEAT} repetitions")
        return int(low), (int(high) if high else None) if comma else int(low)

    def atom(self) -> Regex:
        if self.take("^"):
            return BEGIN
        if self.take("$"):
            # Python's also stands before a last line break
            return either(END, cat(one_of(((10, 10),)), END)) if self.wide else END
        if self.take("."):
            return one_of(inverse(((10, 10),) if self.wide else union(((10, 10), (13, 13), (0x2028, 0x2029)))))
        if self.take("("):
            return self.group()
        if self.peek("[") or self.peek("\\"):
            return one_of(self.characters() if self.take("[") else self.escape(False, self.wide))
        if self.peek("*", "+", "?"):
            raise self.fail("nothing to repeat")
        return one_of(self.single())

    def single(self) -> CharSet:
        code = ord(self.text[self.at])
        if 0xD800 <= code <= 0xDFFF:
            raise self.fail("half of a surrogate pair")
        self.at += 1
        return ((code, code),)

    def group(self) -> Regex:
        if self.peek("?=", "?!", "?<=", "?<!"):
            raise self.fail("lookahead and lookbehind are not supported but for lookahead right behind a leading ^")
        if self.take("?<") or self.take("?P<"):
            end = self.text.find(">", self.at)
            if end < 0:
                raise self.fail("a group without an end")
            self.at = end + 1
        elif self.peek("?") and not self.take("?:"):
            raise self.fail("a group of this kind is not supported")
        inner = self.alternatives()
        if not self.take(")"):
            raise self.fail("a group without an end")
        return inner

    def escape(self, in_class: bool, wide: bool) -> CharSet:
        self.at += 1
        if self.at >= len(self.text):
            raise self.fail("a backslash with nothing behind it")
        char = self.text[self.at]
        self.at += 1
        if char in "dDwWsS":
            return _class(char, wide)
        if char in CONTROLS:
            code = CONTROLS[char]
        elif char == "b" and in_class:
            code = 8
        elif char == "0" and not self.text[self.at : self.at + 1].isdigit():
            code = 0
        elif char == "x":
            code = self.hexadecimal(2)
        elif char == "u":
            code = self.unicode()
        elif char == "c" and self.text[self.at : self.at + 1].isascii() and self.text[self.at : self.at + 1].isalpha():
            code = ord(self.text[self.at]) % 32
            self.at += 1
        elif char.isalnum():
            self.at -= 1
            names = {"b": "a word boundary", "B": "a word boundary", "p": "a Unicode property", "P": "a Unicode property"}
            named = "a back reference" if char.isdigit() or char == "k" else names.get(char, "an escape of this kind")
            raise self.fail(f"{named} (\\{char}) is not supported")
        else:
            code = ord(char)
        if 0xD800 <= code <= 0xDFFF:
            raise self.fail("half of a surrogate pair")
        return ((code, code),)

    def hexadecimal(self, digits: int) -> int:
        text = self.text[self.at : self.at + digits]
        if len(text) < digits or any(char not in "0123456789abcdefABCDEF" for char in text):
            raise self.fail("hexadecimal digits are missing")
        self.at += digits
        return int(text, 16)

    def unicode(self) -> int:
        if self.take("{"):
            end = self.text.find("}", self.at)
            code = self.hexadecimal(max(end - self.at, 1))
            self.at += 1
            if code > 0x10FFFF:
                raise self.fail("no character has such a number")
            return code
        code = self.hexadecimal(4)
        if 0xD800 <= code < 0xDC00 and self.take("\\u"):
            low = self.hexadecimal(4)
            if not 0xDC00 <= low < 0xE000:
                raise self.fail("half of a surrogate pair")
            code = 0x10000 + ((code - 0xD800) << 10) + low - 0xDC00
        return code

    def characters(self) -> CharSet:
        """The rest of a class in brackets."""
        negated = self.take("^")
        wide = self.wide != negated
        sets: list[CharSet] = []
        if self.peek("]"):
            raise self.fail("an empty class")
        while not self.take("]"):
            if self.at >= len(self.text):
                raise self.fail("a class without an end")
            one = self.escape(True, wide) if self.peek("\\") else self.single()
            if self.peek("-") and not self.peek("-]"):
                self.at += 1
                if self.at >= len(self.text):
                    raise self.fail("a class without an end")
                other = self.escape(True, wide) if self.peek("\\") else self.single()
                if any(len(part) > 1 or part[0][0] != part[0][1] for part in (one, other)) or one[0][0] > other[0][0]:
                    raise self.fail("a range whose ends are no characters in their order")
                one = ((one[0][0], other[0][0]),)
            sets.append(one)
        chars = union(*sets)
        return inverse(chars) if negated else common(chars, ALL)

    def whole(self) -> Regex:
        node = self.alternatives()
        if self.at < len(self.text):
            raise self.fail("a parenthesis that nothing opens")
        return node


@functools.lru_cache(512)
def search(pattern: str, wide: bool = False) -> Automaton:
    """The texts in which a pattern is found, anywhere unless it says otherwise.

    Args:
        wide: the wide reading rather than the narrow; see the top of this file.

    Raises:
        ValueError: the pattern is not one, or cannot be had; the message says what and where.
    """
    heads: list[tuple[bool, str]] = []
    rest = pattern
    while rest.startswith(("^(?=", "^(?!")):
        end = _closing(rest, 1)
        heads.append((rest[3] == "=", "^(?:" + rest[4:end] + ")"))
        rest = "^" + rest[end + 1 :]
    if heads and _has_bare_bar(rest):
        raise ValueError("lookahead beside an alternative is not supported")
    found = build(cat(ANY_TEXT, _Reader(rest, wide).whole(), ANY_TEXT))
    for wanted, head in heads:
        one = search(head, wide == wanted)
        found = intersect(found, one if wanted else complement(one))
    return found


def _walk(text: str, start: int) -> list[tuple[int, str]]:
    """Parentheses and bars that are not escaped or in a class, with their places."""
    found, at, in_class = [], start, False
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif in_class:
            in_class = text[at] != "]"
        elif text[at] == "[":
            in_class = True
        elif text[at] in "()|":
            found.append((at, text[at]))
        at += 1
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for at, char in _walk(text, start):
        depth += {"(": 1, ")": -1, "|": 0}[char]
        if not depth:
            return at
    raise ValueError("a group without an end")


def _has_bare_bar(text: str) -> bool:
    depth = 0
    for _, char in _walk(text, 0):
        depth += {"(": 1, ")": -1, "|": 0}[char]
        if char == "|" and not depth:
            return True
    return False


@functools.lru_cache(64)
def whole(pattern: str) -> Automaton:
    """The texts that a pattern without ^ and $ describes from end to end."""
    return build(_Reader(pattern, False).whole())


def lengths(low: int, high: int | None) -> Automaton:
    """The texts of so many characters; none where the most is less than the least."""
    if high is not None and high < low:
        return build(either())
    return build(repeat(one_of(ALL), low, high) if (low, high) != (0, 0) else EMPTY)
