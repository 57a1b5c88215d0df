"""Reduces a JSON schema, for values of one type, to a choice between lists of plain demands.

A *claim* says that a schema holds, or that it does not. A *goal* is a set of claims: everything that one value must meet. For
one type of value a goal becomes *branches*. A branch is a list of *demands*, and a value must meet all demands of at least one
branch. This removes `allOf`, `anyOf`, `oneOf`, `not`, `if` and references; what is inside the value (items, members) has goals
of its own.

A demand is a tuple: its name, then its arguments.

    ("values", texts, holds, keyword, path)   one of these values, written as JSON, or none of them
    ("low" | "high", bound, strict)     of a number            ("whole", holds)          an integer, or not
    ("multiple", number, holds, path)
    ("length", low, high)               of a string            ("pattern" | "format", text, holds, path)
    ("item", index, claim)              if there is one        ("items", start, claim)   all from there on
    ("contains", claim, low, high)      so many items          ("size", low, high)       ("unique", path)
    ("member", name, claim)             if there is one        ("like", pattern, claim, path)   all of such names
    ("rest", names, patterns, claim, path)   all other members ("names", claim)          all names
    ("need", name)                      there is one           ("count", low, high, path)
    ("some", names, patterns, claim, path)   one of the other members
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from . import schema_demands as demands
from . import schema_facts as facts
from .claims import Branch, Claim, Goal, Reasoning, group_of
from .schema_document import Document, Schema, child, refuse

MAX_STEPS = 200_000
"""Most demands that are looked at for one schema."""


class Logic(Reasoning):
    """Turns goals into branches.

    Raises:
        ValueError: from each method: a keyword cannot be had, or the schema is too large.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self._steps = 0
        self._memo: dict[Any, tuple[Branch, ...]] = {}
        self._open: set[Any] = set()

    def spend(self, steps: int) -> None:
        """Count the work, and raise when it becomes too much."""
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS} steps to work out; make it smaller, or its choices fewer")

    def branches(self, wanted: Goal, group: str) -> tuple[Branch, ...]:
        """The branches of a goal for values of one type; none: no such value meets it."""
        key = (frozenset(wanted), group)
        if key not in self._memo:
            self._memo[key] = self.all_of([self.claim(claim, group) for claim in wanted])
        return self._memo[key]

    def claim(self, claim: Claim, group: str) -> tuple[Branch, ...]:
        """The branches of one claim."""
        value = claim.schema.value
        if isinstance(value, bool):
            return ((),) if value is claim.holds else ()
        key = (claim, group)
        if key in self._memo:
            return self._memo[key]
        if key in self._open:
            raise refuse("$ref", claim.schema.path, "leads back to itself")
        self._open.add(key)
        found = [self._keyword(claim.schema, keyword, group, claim.holds) for keyword in value]
        self._memo[key] = self.all_of(found) if claim.holds else self.any_of(found)
        self._open.discard(key)
        return self._memo[key]

    def any_of(self, choices: list[tuple[Branch, ...]]) -> tuple[Branch, ...]:
        found = tuple(dict.fromkeys(itertools.chain(*choices)))
        self.spend(len(found))
        return ((),) if () in found else found

    def all_of(self, parts: list[tuple[Branch, ...]]) -> tuple[Branch, ...]:
        found: tuple[Branch, ...] = ((),)
        for part in sorted(parts, key=lambda one: len(one) > 1):  # a choice comes last, so that it meets all the rest
            if part == ((),):
                continue
            self.spend(len(found) * len(part) * (1 + len(found[0]) if found else 1))
            found = tuple(
                dict.fromkeys(
                    both for left in found for right in part if not _clash(both := tuple(dict.fromkeys(left + right)))
                )
            )
        return found

    def _keyword(self, schema: Schema, keyword: str, group: str, holds: bool) -> tuple[Branch, ...]:
        """The branches of one keyword, or of its opposite."""
        value = schema.value[keyword]
        always, never = (((),), ()) if holds else ((), ((),))
        if keyword == "$ref":
            return self.claim(Claim(self.document.target(schema), holds), group)
        if keyword == "type":
            names = [value] if isinstance(value, str) else value
            if group == "number" and "number" not in names and "integer" in names:
                return ((("whole", holds),),)
            return always if group in names else never
        if keyword in ("enum", "const"):
            values = value if keyword == "enum" else [value]
            texts = tuple(json.dumps(one, ensure_ascii=False) for one in values if group_of(one) == group)
            if not holds and group in ("array", "object") and set(texts) == {"[]" if group == "array" else "{}"}:
                return ((("size", 1, None) if group == "array" else ("count", 1, None, schema.path),),)
            return ((("values", texts, holds, keyword, schema.path),),) if texts else never
        if keyword == "not":
            return self.claim(self.inside(schema, keyword) if not holds else self.inside(schema, keyword).against, group)
        if keyword in ("allOf", "anyOf"):
            join = self.all_of if (keyword == "allOf") == holds else self.any_of
            return join([self.claim(one, group) for one in self._claims(schema, keyword, holds)])
        if keyword == "oneOf":
            return self._one_of(self._claims(schema, keyword), group, holds)
        if keyword == "if":
            return self._condition(schema, group, holds)
        found = getattr(demands, f"{group}_demands", lambda *_: None)(schema, keyword, holds, self)
        return always if found is None else found

    def _claims(self, schema: Schema, keyword: str, holds: bool = True) -> list[Claim]:
        path = child(schema.path, keyword)
        return [Claim(self.document.schema(one, child(path, i)), holds) for i, one in enumerate(schema.value[keyword])]

    def claim_of(self, value: Any, path: str) -> Claim:
        """That a schema at a path of the document holds."""
        return Claim(self.document.schema(value, path))

    def inside(self, schema: Schema, *names: str) -> Claim:
        """That a schema inside of another holds; one that is not there holds always."""
        value, path = schema.value, schema.path
        for name in names:
            value, path = value.get(name, True), child(path, name)
        return self.claim_of(value, path)

    def _one_of(self, claims: list[Claim], group: str, holds: bool) -> tuple[Branch, ...]:
        """One holds and no other; or, without `holds`, none does, or two do."""
        found = []
        if holds:
            for claim in claims:
                if mine := self.claim(claim, group):
                    others = [one for one in claims if one is not claim and not self._apart(claim, one, group)]
                    found.append(self.all_of([mine, *(self.claim(one.against, group) for one in others)]))
            return self.any_of(found)
        found.append(self.all_of([self.claim(one.against, group) for one in claims]))
        pairs = itertools.combinations(claims, 2)
        return self.any_of(found + [self.all_of([self.claim(a, group), self.claim(b, group)]) for a, b in pairs])

    def _apart(self, a: Claim, b: Claim, group: str) -> bool:
        """Whether it is plain that no value of a type meets both claims; False otherwise."""
        self.spend(1)
        return all(facts.impossible(self, branch, group, 3) for branch in self.branches((a, b), group))

    def _condition(self, schema: Schema, group: str, holds: bool) -> tuple[Branch, ...]:
        test = self.inside(schema, "if")
        found = []
        for claim, name in ((test, "then"), (test.against, "else")):
            follows = self.inside(schema, name)
            if name in schema.value or holds:
                found.append(self.all_of([self.claim(one, group) for one in (claim, follows if holds else follows.against)]))
        return self.any_of(found)


def _clash(branch: Branch) -> bool:
    """Whether a branch asks for a member that it forbids."""
    needed = {demand[1] for demand in branch if demand[0] == "need"}
    claims = {(demand[1], demand[2]) for demand in branch if demand[0] == "member" and demand[1] in needed}
    return any(claim.never or (name, claim.against) in claims for name, claim in claims)
