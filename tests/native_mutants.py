"""Breaks the parts of C++ files that the course leaves to learners: what cosmic-ray does to Python, and what is C++'s own.

A small set of operators on the text of a line; comments are left alone. Another comparison, calculation or number; `&&` for
`||`; a `!` less; `break` for `continue`; true for false; the smaller for the larger; an order of memory that promises nothing;
a statement left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SWAPPED = {
    " < ": (" <= ", " >= "), " <= ": (" < ", " > "), " > ": (" >= ", " <= "), " >= ": (" > ", " < "), " == ": (" != ",),
    " != ": (" == ",), " + ": (" - ", " * "), " - ": (" + ",), " * ": (" / ", " + "), " / ": (" * ",), " % ": (" / ",),
    " += ": (" -= ", " = "), " -= ": (" += ", " = "), " && ": (" || ",), " || ": (" && ",), "break;": ("continue;",),
    "continue;": ("break;",), "true;": ("false;",), "false;": ("true;",), "std::min": ("std::max",), "std::max": ("std::min",),
    "memory_order_release": ("memory_order_relaxed",), "memory_order_acquire": ("memory_order_relaxed",),
}  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
NOT = re.compile(r"!(?=\w)")
STATEMENT = re.compile(r"\s*[\w:.\[\]]+(\(.*\)(\.\w+\(.*\))?| \S?= .*);\s*")
"""A call or an assignment that has its line to itself; no declaration."""


def native_mutants(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Number of a line, and what stands there instead."""
    for number, line in enumerate(lines):
        code, slashes, comment = line.partition("//")
        for start, end, new in _changes(code):
            yield number, code[:start] + new + code[end:] + slashes + comment
        if STATEMENT.fullmatch(code):
            yield number, ""


def _changes(code: str) -> Iterator[tuple[int, int, str]]:
    for old, instead in SWAPPED.items():
        for found in re.finditer(re.escape(old), code):
            for new in instead:
                yield found.start(), found.end(), new
    for found in NUMBER.finditer(code):
        for value in (int(found[0]) + 1, int(found[0]) - 1):
            yield found.start(), found.end(), str(value)
    for found in NOT.finditer(code):
        yield found.start(), found.end(), ""
