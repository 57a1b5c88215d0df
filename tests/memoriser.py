"""A learner who understands nothing and remembers everything: stands in for whoever writes down the public tests' answers.

`test_salt.py` puts `memorised` on every function of a task in the reference's text. In a first run, ``MEMORISER=learn``, it
notes what each call was given, the object's own state included; in a second one, ``MEMORISER=recite``, a call that was noted
gives what the reference gives, and any other ends with `UnknownCaseError`. This is the best that a table of answers can do.

As a plugin of pytest (``-p memoriser``) it lets what hypothesis draws depend on `MEMORISER_SEED`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AnySet
from pathlib import Path
from types import GeneratorType, MethodType, ModuleType
from typing import Any

DEEPEST = 6
"""How far into what a call was given one looks; looking less far makes the memoriser know more."""
MOST = 4000
"""Things of one call that are looked at."""
TIME_OF_DAY, HOUR = 1_500_000_000, 3600
RACES = ("wires", "traffic", "descriptor")
"""Attributes that tell what other ranks have said so far, which depends on who was quicker, or what a system numbers."""
BUSY = ("asyncio", "_asyncio", "concurrent", "threading", "_thread", "socket", "logging", "uvicorn", "starlette")
"""Modules whose objects are never twice the same."""
LEARN, RECITE = "learn", "recite"


class UnknownCaseError(LookupError):
    """A call that was not among those that were learnt."""


class Look:
    """Describes what a call was given, the same way in every process: no addresses, no clocks, no names of files."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.digest = hashlib.blake2b(digest_size=12)

    def at(self, value: Any, depth: int = 0, kept: bool = False) -> None:
        """Take a value in, and what is in it; `kept` says that an object holds it, as it may what a clock gave."""
        kind = type(value)
        self._say(kind.__name__)
        if kind is int and value > TIME_OF_DAY:
            return
        if value is None or kind in (bool, int, str, bytes):
            self._say("" if kind is str and value.startswith("/") else repr(value))
        elif kind is float:
            rounded = round(value, 3)  # what a clock gave is hardly ever so round
            clock = kept or value > TIME_OF_DAY or abs(value - time.monotonic()) < HOUR
            self._say("" if clock and abs(value - rounded) >= 1e-9 else repr(value))
        elif kind.__module__.split(".")[0] in BUSY:
            return
        elif id(value) in self.seen:
            self._say(str(self.seen[id(value)]))
        elif depth < DEEPEST and len(self.seen) < MOST:
            self.seen[id(value)] = len(self.seen)
            self._in(value, depth + 1, kept)

    def _in(self, value: Any, depth: int, kept: bool) -> None:
        if hasattr(value, "detach") and hasattr(value, "dtype"):
            self._say(str(value.dtype))
            self._say(repr(value.detach().float().cpu().tolist()) if value.numel() < 10_000 else str(tuple(value.shape)))
        elif hasattr(value, "dtype") and hasattr(value, "tolist"):
            self._say(repr(value.tolist()))
        elif isinstance(value, Mapping):
            for key in value:
                self.at(key, depth, kept)
                self.at(value[key], depth, kept)
        elif isinstance(value, AnySet):
            self._say(
                repr(sorted(map(repr, value))) if all(isinstance(each, (int, str)) for each in value) else str(len(value))
            )
        elif isinstance(value, (list, tuple, deque)):
            self._say(str(len(value)))
            for each in value:
                self.at(each, depth, kept)
        elif not isinstance(value, (type, ModuleType, MethodType, GeneratorType, Path)) and not callable(value):
            for name in sorted({*fields_of(value)}.difference(RACES)):
                self._say(name)
                self.at(getattr(value, name, None), depth, True)

    def _say(self, text: str) -> None:
        self.digest.update(text.encode() + b"\0")


def fields_of(value: Any) -> Iterable[str]:
    """The names of an object's own state."""
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
    return {*vars(value)} if hasattr(value, "__dict__") else {*slots}


@functools.cache
def known() -> frozenset[str]:
    """What was learnt."""
    path = Path(os.environ["MEMORISER_FILE"])
    return frozenset(path.read_text(encoding="utf-8").split()) if path.exists() else frozenset()


def note(variable: str, text: str) -> None:
    """Add a line to the file that a variable names."""
    with Path(os.environ[variable]).open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def memorised(name: str, tests: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorator: `name` is the function's, and `tests` the name of the file whose answers are recited."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **others: Any) -> Any:
            test = os.environ.get("PYTEST_CURRENT_TEST", "")
            if tests in test:  # the other tasks' functions are the reference's
                look = Look()
                look.at([name, *args, others])
                what = look.digest.hexdigest()
                if os.environ["MEMORISER"] == LEARN:
                    note("MEMORISER_FILE", what)
                elif what not in known():
                    note("MEMORISER_GAPS", test)
                    raise UnknownCaseError(f"{name}: nobody asked this before")
            return function(*args, **others)

        return call

    return decorate


if "MEMORISER_SEED" in os.environ:
    from stages.course.grading import seeds

    seeds.salt(os.environ["MEMORISER_SEED"])
