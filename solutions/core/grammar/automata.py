"""Sets of texts as finite automata over Unicode code points: built from regular expressions, intersected, and complemented.

Source: Thompson's construction and the subset construction, as in Aho, Lam, Sethi, Ullman, "Compilers", chapter 3.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .charsets import ALL, CharSet, common, inverse, union

MAX_STATES = 4_000
"""Most states of any automaton on the way; a set of texts that needs more is too costly."""


class TooLarge(ValueError):
    """An automaton would have more than `MAX_STATES` states."""

    def __init__(self) -> None:
        super().__init__("needs too large an automaton; make the pattern or its repetitions smaller")


# ------------------------------------------------------------------------------------------------ regular expressions


@dataclass(frozen=True, slots=True)
class Regex:
    """A node of a regular expression.

    Attributes:
        kind: "set" (one of `chars`), "cat" (`parts` one after the other), "or" (one of `parts`), "rep" (`parts[0]`, `low` to
            `high` times, None: without end), "begin" and "end" (of the text, without a character).
    """

    kind: str
    parts: tuple[Regex, ...] = ()
    chars: CharSet = ()
    low: int = 0
    high: int | None = None


BEGIN, END, EMPTY = Regex("begin"), Regex("end"), Regex("cat")


def one_of(chars: CharSet) -> Regex:
    return Regex("set", chars=chars)


def cat(*parts: Regex) -> Regex:
    return Regex("cat", parts)


def either(*parts: Regex) -> Regex:
    return Regex("or", parts)


def repeat(part: Regex, low: int, high: int | None) -> Regex:
    return Regex("rep", (part,), low=low, high=high)


def literal(text: str) -> Regex:
    return cat(*(one_of(((ord(char), ord(char)),)) for char in text))


ANY_TEXT = repeat(one_of(ALL), 0, None)


class _Nfa:
    """Edges are (chars, target); instead of chars None is a step for nothing, "begin" and "end" are steps at an edge."""

    def __init__(self) -> None:
        self.edges: list[list[tuple[CharSet | str | None, int]]] = []

    def state(self) -> int:
        if len(self.edges) >= 8 * MAX_STATES:
            raise TooLarge
        self.edges.append([])
        return len(self.edges) - 1

    def add(self, node: Regex, start: int) -> int:
        """Add a node's states behind `start`; returns the state behind the node."""
        if node.kind == "cat":
            for part in node.parts:
                start = self.add(part, start)
            return start
        end = self.state()
        if node.kind == "set":
            self.edges[start].append((node.chars, end))
        elif node.kind == "or":
            for part in node.parts:
                begin = self.state()
                self.edges[start].append((None, begin))
                self.edges[self.add(part, begin)].append((None, end))
        elif node.kind == "rep":
            for _ in range(node.low):
                start = self.add(node.parts[0], start)
            if node.high is None:
                loop = self.state()
                self.edges[start].append((None, loop))
                self.edges[self.add(node.parts[0], loop)].append((None, loop))
                self.edges[loop].append((None, end))
            else:
                for _ in range(node.high - node.low):
                    self.edges[start].append((None, end))
                    start = self.add(node.parts[0], start)
                self.edges[start].append((None, end))
        else:
            self.edges[start].append((node.kind, end))
        return end

    def closure(self, states: Iterable[int], edge: str) -> frozenset[int]:
        """What can be reached without a character, at the given edge of the text."""
        found, stack = set(states), list(states)
        while stack:
            for label, target in self.edges[stack.pop()]:
                if (label is None or label == edge) and target not in found:
                    found.add(target)
                    stack.append(target)
        return frozenset(found)


# ----------------------------------------------------------------------------------------------------------- automata


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton whose first state is 0; what has no edge leads nowhere.

    Attributes:
        edges: for each state (chars, target), the sets apart. final: which states may be the last.
    """

    edges: tuple[tuple[tuple[CharSet, int], ...], ...]
    final: tuple[bool, ...]

    @property
    def empty(self) -> bool:
        return not any(self.final)

    def accepts(self, text: str) -> bool:
        state = 0
        for char in text:
            for chars, target in self.edges[state]:
                if any(low <= ord(char) <= high for low, high in chars):
                    state = target
                    break
            else:
                return False
        return self.final[state]

    def listed(self, most: int) -> list[str] | None:
        """All texts, the short ones first; None: there are more than so many."""
        found: list[str] = []
        layer = [("", 0)]
        while layer:
            found += [text for text, state in layer if self.final[state]]
            wide = sum(high - low + 1 for _, state in layer for chars, _ in self.edges[state] for low, high in chars)
            if len(found) + wide > 4 * most:
                return None
            moves = [(text, *edge) for text, state in layer for edge in self.edges[state]]
            layer = [
                (text + chr(code), to) for text, chars, to in moves for low, high in chars for code in range(low, high + 1)
            ]
        return found if len(found) <= most else None

    def lengths(self) -> tuple[int, int | None]:
        """Characters of the shortest and of the longest text; None: there is no longest."""
        depth, queue, shortest = {0: 0}, deque([0]), -1
        while queue:
            state = queue.popleft()
            if self.final[state] and shortest < 0:
                shortest = depth[state]
            for _, target in self.edges[state]:
                if target not in depth:
                    depth[target] = depth[state] + 1
                    queue.append(target)
        longest: dict[int, int] = {}
        layer, steps = {0}, 0
        while layer and steps <= len(self.edges):
            longest = dict.fromkeys(layer, steps)
            layer, steps = {target for state in layer for _, target in self.edges[state]}, steps + 1
        return shortest, None if layer else max(longest.values(), default=0)


def _tidy(edges: list[list[tuple[CharSet, int]]], final: list[bool]) -> Automaton:
    """Drop states from which no end is reached, and merge those that mean the same."""
    back: list[set[int]] = [set() for _ in edges]
    for state, out in enumerate(edges):
        for _, target in out:
            back[target].add(state)
    useful = {state for state, ends in enumerate(final) if ends}
    stack = list(useful)
    while stack:
        for state in back[stack.pop()]:
            if state not in useful:
                useful.add(state)
                stack.append(state)
    if 0 not in useful:
        return Automaton(((),), (False,))
    group = {state: int(final[state]) for state in useful}
    merged: dict[int, tuple[tuple[CharSet, int], ...]] = {}
    count = 0
    while True:
        names: dict[tuple[int, tuple[tuple[CharSet, int], ...]], int] = {}
        for state in sorted(useful):
            by_target: dict[int, list[CharSet]] = {}
            for chars, target in edges[state]:
                if target in useful:
                    by_target.setdefault(group[target], []).append(chars)
            row = tuple(sorted((union(*sets) if len(sets) > 1 else sets[0], target) for target, sets in by_target.items()))
            merged[state] = row
            names.setdefault((group[state], row), len(names))
        fresh = {state: names[group[state], merged[state]] for state in useful}
        group = fresh
        if len(names) == count:
            break
        count = len(names)
        if len(useful) > 600:  # refinement would take too long; what is left is right, but not the smallest
            group = {state: index for index, state in enumerate(sorted(useful))}
            break
    order = [group[0], *(index for index in sorted(set(group.values())) if index != group[0])]
    place = {index: i for i, index in enumerate(order)}
    first = {group[state]: state for state in sorted(useful, reverse=True)}
    rows = []
    for index in order:
        targets: dict[int, list[CharSet]] = {}
        for chars, target in edges[first[index]]:
            if target in useful:
                targets.setdefault(place[group[target]], []).append(chars)
        rows.append(tuple(sorted((union(*sets), target) for target, sets in targets.items())))
    return Automaton(tuple(rows), tuple(final[first[index]] for index in order))


def build(node: Regex) -> Automaton:
    """The automaton of the texts that a regular expression describes from end to end.

    Raises:
        TooLarge: see there.
    """
    nfa = _Nfa()
    start = nfa.state()
    last = nfa.add(node, start)

    def step(states: frozenset[int]) -> list[tuple[CharSet, frozenset[int]]]:
        labels = [edge for state in states for edge in nfa.edges[state]]
        moves = [(pair, target) for label, target in labels if isinstance(label, tuple) for pair in label]
        return [(chars, nfa.closure(targets, "")) for chars, targets in _split(moves)]

    return explore(nfa.closure([start], "begin"), step, lambda states: last in nfa.closure(states, "end"))


def _split(moves: list[tuple[tuple[int, int], Any]]) -> list[tuple[CharSet, frozenset[Any]]]:
    """Moves that may overlap as sets that do not, each with all its targets."""
    cuts = sorted({low for (low, _), _ in moves} | {high + 1 for (_, high), _ in moves})
    starts: dict[int, list[Any]] = {}
    ends: dict[int, list[Any]] = {}
    for (low, high), target in moves:
        starts.setdefault(low, []).append(target)
        ends.setdefault(high + 1, []).append(target)
    active: dict[Any, int] = {}
    found: dict[frozenset[Any], list[tuple[int, int]]] = {}
    for cut, following in itertools.pairwise(cuts):
        for target in ends.get(cut, ()):
            active[target] -= 1
            if not active[target]:
                del active[target]
        for target in starts.get(cut, ()):
            active[target] = active.get(target, 0) + 1
        if active:
            found.setdefault(frozenset(active), []).append((cut, following - 1))
    return [(union(tuple(ranges)), targets) for targets, ranges in found.items()]


def complement(automaton: Automaton) -> Automaton:
    """All other texts."""
    dead = len(automaton.edges)
    edges = []
    for out in automaton.edges:
        rest = inverse(union(*(chars for chars, _ in out)))
        edges.append([*out, (rest, dead)] if rest else list(out))
    edges.append([(ALL, dead)])
    return _tidy(edges, [not ends for ends in automaton.final] + [True])


def intersect(a: Automaton, b: Automaton) -> Automaton:
    """The texts of both.

    Raises:
        TooLarge: see there.
    """

    def step(pair: tuple[int, int]) -> list[tuple[CharSet, tuple[int, int]]]:
        moves = [
            (common(chars, others), (target, other)) for chars, target in a.edges[pair[0]] for others, other in b.edges[pair[1]]
        ]
        return [(both, target) for both, target in moves if both]

    return explore((0, 0), step, lambda pair: a.final[pair[0]] and b.final[pair[1]])


def any_of(*automata: Automaton) -> Automaton:
    """The texts of at least one."""

    def step(states: tuple[int | None, ...]) -> list[tuple[CharSet, tuple[int | None, ...]]]:
        moves = [
            (pair, (index, target))
            for index, state in enumerate(states)
            if state is not None
            for chars, target in automata[index].edges[state]
            for pair in chars
        ]
        found = [(chars, dict(targets)) for chars, targets in _split(moves)]
        return [(chars, tuple(targets.get(index) for index in range(len(states)))) for chars, targets in found]

    def final(states: tuple[int | None, ...]) -> bool:
        return any(state is not None and automata[index].final[state] for index, state in enumerate(states))

    return explore((0,) * len(automata), step, final)


def explore(start: Any, step: Callable[[Any], list[tuple[CharSet, Any]]], final: Callable[[Any], bool]) -> Automaton:
    """The automaton whose states are whatever `step` leads to.

    Args:
        step: from a state, the sets of characters, apart from each other, and where they lead. final: may a text end there?

    Raises:
        TooLarge: see there.
    """
    names, queue = {start: 0}, deque([start])
    edges: list[list[tuple[CharSet, int]]] = []
    ends: list[bool] = []
    while queue:
        state = queue.popleft()
        ends.append(final(state))
        out = []
        for chars, target in step(state):
            if target not in names:
                if len(names) >= MAX_STATES:
                    raise TooLarge
                names[target] = len(names)
                queue.append(target)
            out.append((chars, names[target]))
        edges.append(out)
    return _tidy(edges, ends)
