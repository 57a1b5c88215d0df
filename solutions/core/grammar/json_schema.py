"""Turns a JSON schema into a grammar of the answers that it allows.

For every schema that is not refused:

- Each answer is JSON that `json.loads` accepts, and is valid under the schema.
- No keyword is ignored. If one cannot be honoured, the schema is refused with the keyword and its path. Annotations (title,
  default, what no draft knows) and formats that the standard does not name have no effect.

Where the standard leaves a choice, answers have one form. Separators are ``", "`` and ``": "``, without other white space, or
what a pattern allows around them.
Members come in the order of the schema, then those that the schema does not name. Numbers are as in `numbers`, characters as in
`ebnf`, formats as in `formats`. An object whose schema names members and says nothing of others has no others. Unique items
come in any order if they have at most `MAX_UNIQUE` possible values, and in the order of the values if they have more. With more
than `MAX_VALUES`, such as all strings, there is only one item, because a grammar cannot remember which values it has seen. A
large maxLength beside a pattern or a format may be lowered, and a maxItems above `MAX_ITEMS` is.

Source: https://json-schema.org/draft/2020-12/json-schema-validation; how, in `schema_logic`.
"""

from __future__ import annotations

import functools
import json
from collections import deque
from dataclasses import replace

from . import schema_facts as facts
from . import schema_scalars as scalars
from .automata import Automaton, intersect
from .claims import GROUPS, Branch, Claim, Goal, goal, same
from .ebnf import Part, Rules, json_literal
from .ecma_regex import whole
from .schema_document import Document, refuse
from .schema_logic import Logic

MAX_UNIQUE = 7
MAX_VALUES = 500
MAX_ITEMS = 4_096
"""Most items that an array may require; a larger maxItems is lowered to this."""
MAX_STATES = 5_000
"""Rules for one array or object in which something is counted."""
NOTHING = '""'
JSON_SPACE = whole(r"[ \t\r\n]*")


class _Grammar:
    """The rules of one schema; `space` is the white space between the parts of an answer, None: the usual."""

    def __init__(self, document: Document, space: Automaton | None) -> None:
        self.logic = Logic(document)
        self.rules = Rules()
        self._separator: Part = '", "'
        self._colon: Part = '": "'
        self._space: list[Part] = []
        if space is not None:
            self._space = [(self.rules.automaton(space, False),)]
            self._separator = (self.rules.add("comma", [[*self._space, '","', *self._space]]),)
            self._colon = (self.rules.add("colon", [[*self._space, '":"', *self._space]]),)
        self._waiting: deque[tuple[str, Goal]] = deque()
        self.root = self.value(goal(Claim(document.root)))
        while self._waiting:
            name, wanted = self._waiting.popleft()
            choices: list[list[Part]] = []
            for group in GROUPS:
                for branch in self.logic.branches(wanted, group):
                    choices += self._branch(branch, group)
            self.rules.add(name, choices)

    def value(self, wanted: Goal) -> str:
        """The rule for the values that meet a goal."""
        name, fresh = self.rules.name(("value", frozenset(wanted)))
        if fresh:
            self._waiting.append((name, wanted))
        return name

    def _branch(self, branch: Branch, group: str) -> list[list[Part]]:
        listed = facts.values(self.logic, branch)
        if listed is not None:
            return [[json_literal(text)] for text in listed]
        if group in ("array", "object") and scalars.excluded(branch):
            *_, keyword, path = scalars.having(branch, "values")[0]
            raise refuse(keyword, path, "is not supported where arrays or objects must not be met")
        if group in ("null", "boolean"):
            texts = ["null"] if group == "null" else ["true", "false"]
            return [[json_literal(text)] for text in texts if text not in scalars.excluded(branch)]
        if group == "number":
            return [[(self.rules.automaton(scalars.number_language(branch), False),)]]
        if group == "string":
            return [[(self._text(scalars.texts(branch)),)]]
        if group == "array":
            return [[(self._array(facts.items(branch)),)]]
        return [[(self._object(choice),)] for choice in facts.members(self.logic, branch)]

    def _text(self, texts: scalars.Texts) -> str:
        if texts.language is not None:
            return self.rules.automaton(texts.language, True)
        return self.rules.counted(texts.low, texts.high, texts.chars)

    # ---------------------------------------------------------------------------------------------------------- arrays

    def _array(self, wanted: facts.Items) -> str:
        name, fresh = self.rules.name(wanted)
        if not fresh:
            return name
        if wanted.low > MAX_ITEMS:
            raise ValueError(f"an array must have at most {MAX_ITEMS} items; minItems asks for {wanted.low}")
        inside = None
        if wanted.unique and wanted.high not in (0, 1):
            inside = self._unique(wanted, wanted.unique)
            wanted = wanted if inside else replace(wanted, high=1)
        if inside is None:
            inside = self._counted_items(wanted) if wanted.contains else self._items(wanted, 0)
        return self.rules.add(name, [['"["', *self._space, (inside,), *self._space, '"]"']])

    def _items(self, wanted: facts.Items, index: int) -> str:
        """The rule for all items from one on, with the comma before them."""
        name, fresh = self.rules.name((wanted, index))
        if not fresh:
            return name
        heads = max(len(wanted.heads), 1)
        end: list[list[Part]] = [[NOTHING]] if index >= wanted.low else []
        if index < heads:
            item = self.value(wanted.heads[index] if index < len(wanted.heads) else wanted.rest)
            if wanted.high is None or index < wanted.high:
                end.append([*([self._separator] if index else []), (item,), (self._items(wanted, index + 1),)])
            return self.rules.add(name, end)
        more, fresh = self.rules.name(("item", frozenset(wanted.rest)))
        if fresh:
            self.rules.add(more, [[self._separator, (self.value(wanted.rest),)]])
        high = None if wanted.high is None else min(wanted.high, MAX_ITEMS) - index
        if high is not None and high < 0:
            return self.rules.add(name, end)
        return self.rules.add(name, [[(more, max(wanted.low - index, 0), high)]])

    def _counted_items(self, wanted: facts.Items) -> str:
        """The rule for items of which some are counted apart."""
        tops = tuple(low if high is None else high for _, low, high in wanted.contains)
        last = max(len(wanted.heads), wanted.low, wanted.high or 0)
        states = (last + 1) * functools.reduce(lambda a, b: a * (b + 1), tops, 1)
        if states > MAX_STATES:
            raise ValueError(f'"contains" with so many items takes more than {MAX_STATES} rules; make the numbers smaller')

        def at(index: int, counts: tuple[int, ...]) -> str:
            name, fresh = self.rules.name((wanted, index, counts))
            if not fresh:
                return name
            done = index >= wanted.low and all(n >= low for n, (_, low, _) in zip(counts, wanted.contains, strict=True))
            choices: list[list[Part]] = [[NOTHING]] if done else []
            if wanted.high is None or index < wanted.high:
                start = wanted.heads[index] if index < len(wanted.heads) else wanted.rest
                for claims, after in self._kinds(wanted, counts, tops):
                    item = self.value(goal(*start, *claims))
                    choices.append([*([self._separator] if index else []), (item,), (at(min(index + 1, max(last, 1)), after),)])
            return self.rules.add(name, choices)

        return at(0, (0,) * len(tops))

    def _kinds(
        self, wanted: facts.Items, counts: tuple[int, ...], tops: tuple[int, ...]
    ) -> list[tuple[list[Claim], tuple[int, ...]]]:
        """What the next item may be among those that are counted, with the counts behind it."""
        kinds: list[tuple[list[Claim], tuple[int, ...]]] = [([], ())]
        for (claim, _, high), count, top in zip(wanted.contains, counts, tops, strict=True):
            one = [] if high is not None and count >= high else [([claim], min(count + 1, top))]
            other = ([] if high is None else [claim.against], count)
            kinds = [([*claims, *more], (*after, n)) for claims, after in kinds for more, n in (*one, other)]
        return kinds

    def _unique(self, wanted: facts.Items, path: str) -> str | None:
        """The rule for items that are all different, from a list of values; None: there is none, and one item is enough.

        Args:
            path: of the schema that asks for it.
        """
        values = None if wanted.heads or wanted.contains else self._finite(wanted.rest)
        if values is None:
            if wanted.low > 1:
                why = f"is not supported for {wanted.low} items but where there are at most {MAX_VALUES} values for all (enum)"
                raise refuse("uniqueItems", path, why)
            return None
        texts = list({same(json.loads(text)): text for text in reversed(values)}.values())[::-1]
        high = len(texts) if wanted.high is None else min(wanted.high, len(texts))
        if len(texts) > MAX_UNIQUE:
            return self._in_order(wanted, path, texts, high)

        def at(left: tuple[int, ...], count: int) -> str:
            name, fresh = self.rules.name((wanted, left, count))
            if not fresh:
                return name
            choices: list[list[Part]] = [[NOTHING]] if count >= wanted.low else []
            for i in left if count < high else ():
                rest = tuple(j for j in left if j != i)
                choices.append([*([self._separator] if count else []), json_literal(texts[i]), (at(rest, count + 1),)])
            return self.rules.add(name, choices)

        return at(tuple(range(len(texts))), 0)

    def _in_order(self, wanted: facts.Items, path: str, texts: list[str], high: int) -> str:
        """The rule for some of these texts in their order, at most `high` of them."""
        top = max(1, wanted.low, high if high < len(texts) else 0)
        if len(texts) * (top + 1) > MAX_STATES:
            raise refuse("uniqueItems", path, f"is not supported for so many of {len(texts)} values")
        names = [[self.rules.name((wanted, i, count))[0] for count in range(top + 1)] for i in range(len(texts) + 1)]
        for i, text in enumerate(texts):
            for count in range(top + 1):
                choices: list[list[Part]] = [[(names[i + 1][count],)]]
                if count < high or top < high:
                    choices.append(
                        [*([self._separator] if count else []), json_literal(text), (names[i + 1][min(count + 1, top)],)]
                    )
                self.rules.add(names[i][count], choices)
        for count in range(top + 1):
            self.rules.add(names[-1][count], [[NOTHING]] if count >= wanted.low else [])
        return names[0][0]

    def _finite(self, wanted: Goal) -> list[str] | None:
        """All values of a goal, if there are not too many."""
        found: list[str] = []
        for group in GROUPS:
            for branch in self.logic.branches(wanted, group):
                listed = facts.values(self.logic, branch)
                if listed is None and group in ("null", "boolean"):
                    texts = ["null"] if group == "null" else ["true", "false"]
                    listed = [text for text in texts if text not in scalars.excluded(branch)]
                elif listed is None and group == "number":
                    listed = scalars.number_language(branch).listed(MAX_VALUES)
                elif listed is None and group == "string" and (language := scalars.texts(branch).language):
                    listed = language.listed(MAX_VALUES)
                    listed = listed and [json.dumps(text, ensure_ascii=False) for text in listed]
                if listed is None:
                    return None
                found += listed
        return found if len(found) <= MAX_VALUES else None

    # --------------------------------------------------------------------------------------------------------- objects

    def _object(self, wanted: facts.Members) -> str:
        key = (tuple(wanted.named.items()), wanted.needed, wanted.others, wanted.low, wanted.high, wanted.last)
        name, fresh = self.rules.name(key)
        if not fresh:
            return name
        entries = list(wanted.named.items())
        low, high = wanted.low, wanted.high
        if low <= len(wanted.needed):
            low = 0
        if high is not None and high >= len(entries) and not wanted.others:
            high = None
        if low > len(entries) + 1 and wanted.others:
            raise refuse("minProperties", wanted.path, "is not supported above 1 more than the members that the schema names")
        top = max(1, low, high or 0)
        if (len(entries) + 1) * (top + 1) > 4 * MAX_STATES:
            raise ValueError(f"an object at {wanted.path} counts too many members; make minProperties or maxProperties smaller")

        # from the last member to the first, so that no rule waits for another
        after = [self._rest(wanted, count, low, high) for count in range(top + 1)]
        for member, one in reversed(entries):
            item: list[Part] = [json_literal(json.dumps(member, ensure_ascii=False)), self._colon, (self.value(one),)]
            before = []
            for count in range(top + 1):
                choices: list[list[Part]] = []
                if high is None or count < high:
                    choices.append([*([self._separator] if count else []), *item, (after[min(count + 1, top)],)])
                if member not in wanted.needed:
                    choices.append([(after[count],)])
                before.append(self.rules.add(self.rules.name((key, member, count))[0], choices))
            after = before
        return self.rules.add(name, [['"{"', *self._space, (after[0],), *self._space, '"}"']])

    def _rest(self, wanted: facts.Members, count: int, low: int, high: int | None) -> str:
        """The rule for members without a name of their own behind so many others."""
        key = ("rest", wanted.others, wanted.last, count, low, high)
        name, fresh = self.rules.name(key)
        if not fresh:
            return name
        free = None if high is None else high - count
        if wanted.last is not None:
            if free == 0:
                return self.rules.add(name, [])
            entry = self._entry((wanted.last,))
            more = (self._comma(self._entry(wanted.others), False), 0, None if free is None else free - 1)
            if low - count > 1:
                return self.rules.add(name, [])
            return self.rules.add(name, [[*([self._separator] if count else []), more, (entry,)]])
        least = max(low - count, 0)  # each member counts once, though its name may come twice
        if not wanted.others or free == 0:
            return self.rules.add(name, [] if least else [[NOTHING]])
        if least > 1:
            return self.rules.add(name, [])
        entry = self._entry(wanted.others)
        more_name = self._comma(entry, True)
        if count:
            return self.rules.add(name, [[(more_name, least, free)]])
        some: list[Part] = [(entry,), (more_name, 0, None if free is None else free - 1)]
        return self.rules.add(name, [some] if least else [[NOTHING], some])

    def _entry(self, others: tuple[tuple[Automaton, Goal], ...]) -> str:
        name, fresh = self.rules.name(("entry", others))
        if fresh:
            choices: list[list[Part]] = [
                [(self.rules.automaton(names, True),), self._colon, (self.value(one),)] for names, one in others
            ]
            self.rules.add(name, choices)
        return name

    def _comma(self, entry: str, before: bool) -> str:
        name, fresh = self.rules.name(("comma", entry, before))
        return self.rules.add(name, [[self._separator, (entry,)] if before else [(entry,), self._separator]]) if fresh else name


@functools.lru_cache(64)
def to_grammar(text: str, white_space: str | None = None) -> str:
    """The grammar, in XGrammar's EBNF, of the answers that a JSON schema allows.

    Args:
        text: the schema as JSON: an object, true or false.
        white_space: a regular expression for what may stand around commas and colons and within brackets.

    Raises:
        ValueError: it is no schema, cannot be had, or no value is valid; the message says what and where. Or the expression is
            none that white space matches.
    """
    space = None if white_space is None else _space(white_space)
    grammar = _Grammar(Document(text), space)
    return grammar.rules.text(grammar.root)


def _space(pattern: str) -> Automaton:
    """The white space that a pattern allows and JSON too.

    Raises:
        ValueError: there is none.
    """
    try:
        found = intersect(whole(pattern), JSON_SPACE)
    except ValueError as error:
        raise ValueError(f"the keyword whitespace_pattern {pattern!r}: {error}") from None
    if not any(found.final):
        raise ValueError(f"the keyword whitespace_pattern {pattern!r} matches no white space of JSON")
    return found
