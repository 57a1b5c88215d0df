"""Claims that a value satisfies a schema, goals made of them, and when two values of JSON are equal."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from .schema_document import Schema

GROUPS = ("null", "boolean", "number", "string", "array", "object")
"""Types of values, where an integer is a number."""


@dataclass(frozen=True, slots=True)
class Claim:
    """That a schema holds of a value, or that it does not."""

    schema: Schema
    holds: bool = True

    @property
    def against(self) -> Claim:
        return Claim(self.schema, not self.holds)

    @property
    def never(self) -> bool:
        """Whether no value meets it."""
        return self.schema.value is (not self.holds)


NEVER = Claim(Schema(-1, False, ""))
Demand = tuple[Any, ...]
Branch = tuple[Demand, ...]
Goal = tuple[Claim, ...]


def group_of(value: Any) -> str:
    """The type of a value, one of `GROUPS`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    names = ((int | float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next(name for kind, name in names if isinstance(value, kind))


def same(value: Any) -> Any:
    """A form of a value that is equal, and can be hashed, where JSON holds two values to be equal."""
    if isinstance(value, dict):
        return "object", frozenset((name, same(one)) for name, one in value.items())
    if isinstance(value, list):
        return "array", tuple(map(same, value))
    return group_of(value), value


def goal(*claims: Claim) -> Goal:
    """All these claims, each once, without those that say nothing."""
    return tuple(dict.fromkeys(claim for claim in claims if claim.schema.value is not claim.holds))


class Reasoning(abc.ABC):
    """What those who know single keywords ask of the one who knows them all (`schema_logic.Logic`).

    Attributes:
        never: a claim that no value meets.

    Raises:
        ValueError: from each method: a keyword cannot be had, or the schema is too large.
    """

    never = NEVER

    @abc.abstractmethod
    def spend(self, steps: int) -> None:
        """Count work, and give up where it becomes too much."""
        ...

    @abc.abstractmethod
    def branches(self, wanted: Goal, group: str) -> tuple[Branch, ...]:
        """The branches of a goal for values of one type; none: no such value meets it."""
        ...

    @abc.abstractmethod
    def claim(self, claim: Claim, group: str) -> tuple[Branch, ...]:
        """The branches of one claim."""
        ...

    @abc.abstractmethod
    def any_of(self, choices: list[tuple[Branch, ...]]) -> tuple[Branch, ...]:
        """The branches of a choice."""
        ...

    @abc.abstractmethod
    def all_of(self, parts: list[tuple[Branch, ...]]) -> tuple[Branch, ...]:
        """The branches of several demands at once."""
        ...

    @abc.abstractmethod
    def claim_of(self, value: Any, path: str) -> Claim:
        """That a schema at a path of the document holds."""
        ...

    @abc.abstractmethod
    def inside(self, schema: Schema, *names: str) -> Claim:
        """That a schema inside of another holds; one that is not there holds always."""
        ...
