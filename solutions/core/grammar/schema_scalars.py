"""A branch's demands on numbers and texts put together: one range, one automaton; see `schema_logic`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeVar

from .automata import ANY_TEXT, Automaton, TooLarge, build, complement, either, intersect, literal
from .charsets import ALL, CharSet
from .claims import Branch, Demand
from .ecma_regex import lengths, search
from .formats import texts_of
from .numbers import Bounds, numbers
from .schema_document import refuse

Made = TypeVar("Made")
MAX_COUNTED = 3_000
"""Most states of an automaton that also counts characters; a longest length that needs more is lowered."""


def having(branch: Branch, *names: str) -> list[Demand]:
    """A branch's demands of some names."""
    return [demand for demand in branch if demand[0] in names]


def extent(branch: Branch, name: str) -> tuple[int, int | None]:
    """The least and the most of what a name counts."""
    found = having(branch, name)
    highest = [demand[2] for demand in found if demand[2] is not None]
    return max((demand[1] for demand in found), default=0), min(highest, default=None)


def naming(keyword: str, path: str, make: Callable[..., Made], *args: Any) -> Made:
    """What `make` makes; its complaint names the keyword."""
    try:
        return make(*args)
    except ValueError as error:
        raise refuse(keyword, path, f"is not supported: {error}") from None


def excluded(branch: Branch) -> list[str]:
    """The values, as JSON texts, that a branch forbids."""
    return [text for demand in having(branch, "values") if not demand[2] for text in demand[1]]


# ------------------------------------------------------------------------------------------------------------ numbers


def number_language(branch: Branch) -> Automaton:
    """The texts of the numbers of a branch."""
    ends: dict[str, tuple[int | float, bool] | None] = {"low": None, "high": None}
    for name, bound, strict in having(branch, "low", "high"):
        old = ends[name]
        tighter = old is None or (bound > old[0] if name == "low" else bound < old[0]) or (bound == old[0] and strict)
        ends[name] = (bound, strict) if tighter else old
    multiples = having(branch, "multiple")
    whole_numbers = [demand[1] for demand in having(branch, "whole")]
    bounds = Bounds(
        ends["low"], ends["high"], True in whole_numbers, False in whole_numbers,
        tuple(demand[1] for demand in multiples if demand[2]), tuple(demand[1] for demand in multiples if not demand[2]),
    )  # fmt: skip
    barred = tuple(json.loads(text) for text in excluded(branch))
    bounds = replace(bounds, barred=barred)
    return naming("multipleOf", multiples[0][3], numbers, bounds) if multiples else numbers(bounds)


# -------------------------------------------------------------------------------------------------------------- texts


@dataclass(frozen=True)
class Texts:
    """Texts of `low` to `high` of some characters; or, if there is one, those of an automaton."""

    low: int = 0
    high: int | None = None
    chars: CharSet = ALL
    language: Automaton | None = None

    @property
    def empty(self) -> bool:
        if self.language is not None:
            return self.language.empty
        return self.high is not None and self.low > self.high

    def accepts(self, text: str) -> bool:
        if self.language is not None:
            return self.language.accepts(text)
        return self.low <= len(text) and (self.high is None or len(text) <= self.high)


def texts(branch: Branch, formats: bool = True) -> Texts:
    """The texts, as values, of a branch. A format that no text has beside the rest is left to be an annotation."""
    low, high = extent(branch, "length")
    found: Automaton | None = None
    path = keyword = ""
    for name, text, holds, path in having(branch, "pattern", *(["format"] if formats else [])):
        keyword = name
        pattern = name == "pattern"
        one = naming(name, path, search, text, not holds) if pattern else naming(name, path, texts_of, text)
        one = one if holds else naming(name, path, complement, one)
        found = one if found is None else naming(name, path, intersect, found, one)
    barred = excluded(branch)
    if barred:
        keyword, path = having(branch, "values")[0][3:]
        found = outside(build(ANY_TEXT) if found is None else found, [json.loads(text) for text in barred], path)
    if found is None:
        return Texts(low, high)
    cut = found if found.empty else naming(keyword, path, _cut, found, low, high)
    if isinstance(cut, Texts):
        return cut
    if cut.empty and formats and having(branch, "format"):
        return texts(branch, False)
    return Texts(language=cut)


def _cut(found: Automaton, low: int, high: int | None) -> Automaton | Texts:
    """An automaton's texts of at least and at most so many characters."""
    shortest, longest = found.lengths()
    low = low if low > shortest else 0
    high = None if high is None or (longest is not None and longest <= high) else high
    if (low, high) == (0, None):
        return found
    if (chars := _one_class(found)) is not None:
        return Texts(max(low, len(found.edges) - 1), high, chars)
    most = max(MAX_COUNTED // len(found.edges), 16)
    if max(low, shortest) > most:
        raise ValueError("a length as large beside it needs too large an automaton")
    if high is not None and longest is None:
        high = min(high, most)
    try:  # where texts have an end, those within reach have fewer states than there are products
        return intersect(found, lengths(low, high))
    except TooLarge:
        if high is None or high <= most:
            raise
        return intersect(found, lengths(low, most))


def _one_class(found: Automaton) -> CharSet | None:
    """The characters of an automaton for nothing but: so many of these, or more."""
    last = len(found.edges) - 1
    chars = found.edges[last][0][0] if found.edges[last] else None
    plain = all(out == ((chars, min(i + 1, last)),) for i, out in enumerate(found.edges))
    return chars if plain and found.final == (False,) * last + (True,) else None


def outside(found: Automaton, names: Iterable[str], path: str) -> Automaton:
    """The texts that are none of these names."""
    if not names:
        return found
    return naming("properties", path, intersect, found, complement(build(either(*map(literal, names)))))


def formats_apart(branch: Branch) -> bool:
    """Whether plainly no text has all formats of a branch, or none meets the rest of it."""
    languages = [texts_of(text) if holds else complement(texts_of(text)) for _, text, holds, _ in having(branch, "format")]
    return reduce(intersect, languages).empty or texts(branch, False).empty
