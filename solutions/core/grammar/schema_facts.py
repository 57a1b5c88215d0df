"""A branch's demands put together: the items of an array, the members of an object, the values that it lists; see
`schema_logic`. Those on numbers and texts are in `schema_scalars`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from .automata import ANY_TEXT, Automaton, any_of, build, complement, either, intersect, literal, one_of, repeat
from .claims import GROUPS, Branch, Claim, Demand, Goal, Reasoning, goal, group_of, same
from .ecma_regex import lengths, search
from .numbers import exact
from .schema_document import refuse
from .schema_scalars import extent, formats_apart, having, naming, number_language, outside, texts

# ------------------------------------------------------------------------------------------------------------- arrays


@dataclass(frozen=True)
class Items:
    """An array: goals of the first items, of all others, how many there may be, and of what kinds so many.

    Attributes:
        contains: (claim, least, most or None). unique: the path of the schema that asks for it.
    """

    heads: tuple[Goal, ...]
    rest: Goal
    low: int
    high: int | None
    contains: tuple[tuple[Claim, int, int | None], ...]
    unique: str | None


def items(branch: Branch) -> Items:
    """The array of a branch."""
    single, following = having(branch, "item"), having(branch, "items")
    count = max((*(demand[1] + 1 for demand in single), *(demand[1] for demand in following)), default=0)

    def at(index: int) -> Goal:
        claims = [demand[2] for demand in single if demand[1] == index]
        return goal(*claims, *(demand[2] for demand in following if demand[1] <= index))

    low, high = extent(branch, "size")
    for _, start, claim in following:
        if claim.never:
            high = start if high is None else min(high, start)
    contains = tuple(dict.fromkeys(demand[1:] for demand in having(branch, "contains")))
    unique = having(branch, "unique")
    return Items(tuple(map(at, range(count))), at(count), low, high, contains, unique[0][1] if unique else None)


# ------------------------------------------------------------------------------------------------------------ objects


@dataclass(frozen=True)
class Members:
    """An object.

    Attributes:
        named: goals of the members with a name of their own, in the order of the schema. needed: those that must be there.
        others: names of other members, each set with the goal of such a member; no name is in two. last: (names, goal): so is
            the last of the others. low, high: how many members there may be. path: where the schema is.
    """

    named: dict[str, Goal]
    needed: frozenset[str]
    others: tuple[tuple[Automaton, Goal], ...]
    low: int
    high: int | None
    last: tuple[Automaton, Goal] | None = None
    path: str = "$"


def _names_of(logic: Reasoning, demand: Demand) -> Callable[[str], bool]:
    """Whether a "rest" or "some" demand is about a name."""
    names, patterns, only = (*demand[1:3], None) if demand[0] == "rest" else demand[1:4]
    path = demand[-1]

    def about(name: str) -> bool:
        if only is not None and not naming("patternProperties", path, search, only).accepts(name):
            return False
        return name not in names and not any(naming("patternProperties", path, search, one).accepts(name) for one in patterns)

    return about


def _language(names: Any, patterns: Any, only: str | None, path: str) -> Automaton:
    """The names that are none of these, match none of these patterns, and do match another."""
    found = build(ANY_TEXT) if only is None else naming("patternProperties", path, search, only)
    for pattern in patterns:
        found = naming("patternProperties", path, intersect, found, complement(search(pattern, True)))
    return outside(found, names, path)


def members(logic: Reasoning, branch: Branch) -> list[Members]:
    """The objects of a branch: one choice or several."""
    single, like, rest = having(branch, "member"), having(branch, "like"), having(branch, "rest")
    needed = [demand[1] for demand in having(branch, "need")]
    order = list(dict.fromkeys([*(demand[1] for demand in single), *needed]))
    low, high = extent(branch, "count")
    paths = [demand[-1] for demand in branch if demand[0] in ("like", "rest", "names", "some", "count")]
    path = paths[0] if paths else "$"
    name_goal = goal(*(demand[1] for demand in having(branch, "names")))

    def at(name: str) -> Goal:
        claims = [demand[2] for demand in single if demand[1] == name]
        claims += [
            claim for _, pattern, claim, where in like if naming("patternProperties", where, search, pattern).accepts(name)
        ]
        claims += [demand[3] for demand in rest if _names_of(logic, demand)(name)]
        return goal(*claims, *(() if meets(logic, name_goal, name) else (logic.never,)))

    named = {name: at(name) for name in order}
    closed = any(not demand[2].never for demand in single) and not rest
    others: list[tuple[Automaton, Goal]] = []
    some = having(branch, "some")
    if not closed or like or some or low > len(named):
        others = _others(logic, branch, list(named), name_goal, path)
        if closed and not some and low <= len(named):
            others = [(names, wanted) for names, wanted in others if wanted]
    found = [Members(named, frozenset(needed), tuple(others), low, high, path=path)]
    for demand in some:
        found = [choice for one in found for choice in _with_some(logic, one, demand)]
    return found


def _others(logic: Reasoning, branch: Branch, taken: list[str], name_goal: Goal, path: str) -> list[tuple[Automaton, Goal]]:
    """The names that have no goal of their own, parted by what their members must meet."""
    start = build(ANY_TEXT)
    if name_goal:
        start = any_of(*(_language_of(logic, one) for one in logic.branches(name_goal, "string")))
    parted = [(outside(start, taken, path), goal())]
    for _, pattern, claim, where in having(branch, "like"):
        inner, outer = (naming("patternProperties", where, search, pattern, wide) for wide in (False, True))
        parted = [
            (names, wanted)
            for old, wanted_before in parted
            for names, wanted in (
                (naming("patternProperties", where, intersect, old, inner), goal(*wanted_before, claim)),
                (naming("patternProperties", where, intersect, old, complement(outer)), wanted_before),
            )
            if not names.empty
        ]
    for demand in having(branch, "rest"):
        inner = _language(demand[1], demand[2], None, demand[-1])
        parted = [
            (both, wanted)
            for old, before in parted
            for both, wanted in (
                (intersect(old, inner), goal(*before, demand[3])),
                (intersect(old, complement(inner)), before),
            )
            if not both.empty
        ]
    return [(names, wanted) for names, wanted in parted if not any(claim.never for claim in wanted)]


def _language_of(logic: Reasoning, branch: Branch) -> Automaton:
    """The texts of a branch as an automaton."""
    listed = values(logic, branch)
    if listed is not None:
        return build(either(*(literal(json.loads(text)) for text in listed)))
    one = texts(branch)
    return one.language or intersect(
        build(repeat(one_of(one.chars), 0, None)), lengths(one.low, one.high and min(one.high, 256))
    )


def _with_some(logic: Reasoning, one: Members, demand: Demand) -> list[Members]:
    """The choices of an object of which some member outside certain names must meet a claim."""
    _, names, patterns, only, claim, path = demand
    about = _names_of(logic, demand)
    found = []
    for name, wanted in one.named.items():
        if about(name):
            fresh = {**one.named, name: goal(*wanted, claim)}
            found.append(replace(one, named=fresh, needed=one.needed | {name}))
    language = _language(names, patterns, only, path)
    for other, wanted in one.others:
        if not (both := intersect(other, language)).empty:
            if one.last is not None:
                raise refuse(
                    "not", path, "is not supported where several members that have no name in the schema must be there"
                )
            found.append(replace(one, last=(both, goal(*wanted, claim))))
    return found


# ------------------------------------------------------------------------------------------------------- single values


@lru_cache(256)
def _same(listed: tuple[str, ...]) -> frozenset[Any]:
    return frozenset(same(json.loads(text)) for text in listed)


def _holds(logic: Reasoning, branch: Branch, value: Any) -> bool:
    """Whether a value meets all of a branch's demands."""
    kind = group_of(value)
    for _, listed, holds, *_ in having(branch, "values"):
        if (same(value) in _same(listed)) != holds:
            return False
    if kind == "number":
        return _number_holds(branch, value)
    if kind == "string":
        return texts(branch, False).accepts(value)
    if kind == "array":
        return _items_hold(logic, items(branch), value)
    return kind != "object" or _members_hold(logic, branch, value)


def _number_holds(branch: Branch, value: int | float) -> bool:
    for name, bound, strict in having(branch, "low", "high"):
        if not (value > bound if name == "low" else value < bound) and (strict or value != bound):
            return False
    if any((value == int(value)) != holds for _, holds in having(branch, "whole")):
        return False
    return all(((exact(value) / exact(step)).denominator == 1) == holds for _, step, holds, _ in having(branch, "multiple"))


def _items_hold(logic: Reasoning, wanted: Items, value: list[Any]) -> bool:
    if not wanted.low <= len(value) or (wanted.high is not None and len(value) > wanted.high):
        return False
    if wanted.unique and len({same(one) for one in value}) < len(value):
        return False
    goals = [*wanted.heads, *[wanted.rest] * len(value)]
    if not all(meets(logic, one, item) for one, item in zip(goals, value, strict=False)):
        return False
    for claim, low, high in wanted.contains:
        count = sum(meets(logic, (claim,), item) for item in value)
        if count < low or (high is not None and count > high):
            return False
    return True


def _members_hold(logic: Reasoning, branch: Branch, value: dict[str, Any]) -> bool:
    low, high = extent(branch, "count")
    if len(value) < low or (high is not None and len(value) > high):
        return False
    if any(demand[1] not in value for demand in having(branch, "need")):
        return False
    for name, one in value.items():
        claims = [demand[2] for demand in having(branch, "member") if demand[1] == name]
        claims += [demand[2] for demand in having(branch, "like") if search(demand[1]).accepts(name)]
        claims += [demand[3] for demand in having(branch, "rest") if _names_of(logic, demand)(name)]
        if not meets(logic, goal(*claims), one) or not all(meets(logic, (d[1],), name) for d in having(branch, "names")):
            return False
    some = having(branch, "some")
    return all(any(_names_of(logic, d)(name) and meets(logic, (d[4],), one) for name, one in value.items()) for d in some)


def meets(logic: Reasoning, wanted: Goal, value: Any) -> bool:
    """Whether a value meets a goal; a format is an annotation here, for the value is the schema's own."""
    logic.spend(1)
    return any(_holds(logic, branch, value) for branch in logic.branches(wanted, group_of(value)))


def values(logic: Reasoning, branch: Branch) -> list[str] | None:
    """The values, as JSON texts in the schema's order, of a branch that lists them; None if it does not."""
    lists = [demand[1] for demand in having(branch, "values") if demand[2]]
    if not lists:
        return None
    return [text for text in dict.fromkeys(lists[0]) if _holds(logic, branch, json.loads(text))]


def impossible(logic: Reasoning, branch: Branch, group: str, depth: int) -> bool:
    """Whether it is plain that no value meets a branch. False does not mean that some value does."""
    listed = values(logic, branch)
    if listed is not None:
        return not listed
    if group == "number":
        return number_language(branch).empty
    if group == "string":
        return texts(branch, False).empty if not having(branch, "format") else formats_apart(branch)
    if group == "array":
        wanted = items(branch)
        if wanted.high is not None and wanted.low > wanted.high:
            return True
        return depth > 0 and any(_nothing(logic, one, depth - 1) for one in wanted.heads[: wanted.low])
    if group == "object":
        return depth > 0 and all(
            any(_nothing(logic, one.named[name], depth - 1) for name in one.needed) for one in members(logic, branch)
        )
    return False


def _nothing(logic: Reasoning, wanted: Goal, depth: int) -> bool:
    return all(impossible(logic, branch, group, depth) for group in GROUPS for branch in logic.branches(wanted, group))
