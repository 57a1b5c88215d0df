"""Reads what other programs wrote, a JSON file or a GGUF header, and checks the kind of each entry as it is taken out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_WHOLE, MAX_NUMBER = 2**31 - 1, 1e30


class ModelError(ValueError):
    """A model is not there, or cannot run as asked. The message is one line for the user."""


class _Required:
    pass


REQUIRED: Any = _Required()
"""As a default: the entry must be there."""


class Entries:
    """A description's entries. ``null`` counts as an entry that is not there.

    Args:
        content: names and values, as they were read.
        where: the file's name, for messages.

    Raises:
        ModelError: each method does, for an entry that is required and missing, or of the wrong kind.
    """

    def __init__(self, content: dict[str, Any], where: str = "config.json") -> None:
        self.content, self.where = content, where

    def silent(self, **defaults: Any) -> Entries:
        """The same, where names that are not there at all mean `defaults`; ``null`` still means that there is none."""
        return Entries(defaults | self.content, self.where)

    def whole(self, name: str, default: Any = REQUIRED, low: int = 1, high: int = MAX_WHOLE) -> Any:
        """A whole number from `low` to `high`."""
        value = self._get(name, default)
        good = type(value) is int and low <= value <= high
        return value if value is default or good else self._refuse(name, f"a whole number from {low} to {high}", value)

    def number(self, name: str, default: Any = REQUIRED, low: float = 0.0, above: bool = False) -> Any:
        """A finite number of at least `low`; `above`: of more than that."""
        value = self._get(name, default)
        if value is default:
            return value
        good = type(value) in (int, float) and abs(value) <= MAX_NUMBER  # not NaN
        if not good or value < low or (above and value == low):
            self._refuse(name, f"a number {'above' if above else 'of at least'} {low:g}", value)
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        return value if type(value) is bool else self._refuse(name, "true or false", value)

    def text(self, name: str, default: Any = REQUIRED) -> Any:
        """A string."""
        value = self._get(name, default)
        return value if value is default or isinstance(value, str) else self._refuse(name, "a string", value)

    def entries(self, name: str) -> Entries:
        """The entries of an object; none if it is not there."""
        value = self._get(name, None)
        if value is not None and not isinstance(value, dict):
            self._refuse(name, "an object", value)
        return Entries(value or {}, self.where)

    def many(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A list whose members are all of one kind."""
        value = self._get(name, default)
        good = isinstance(value, list) and all(type(member) is kind for member in value)
        return value if value is default or good else self._refuse(name, f"a list of {kind.__name__}", value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of numbers above 0."""
        value = self._get(name, REQUIRED)
        if not isinstance(value, list) or not all(type(each) in (int, float) and 0 < each <= MAX_NUMBER for each in value):
            self._refuse(name, "a list of numbers above 0", value)
        return tuple(map(float, value))

    def token_ids(self, name: str, vocab_size: int) -> list[int] | None:
        """The token ids of an entry that is one id or a list of them; None: the entry is not there.

        Ids outside the vocabulary are left out, because the model cannot make such a token. Files do hold them: -1 for "none",
        or the id of a token that was added to the tokenizer alone.
        """
        value = self._get(name, None)
        if value is None:
            return None
        members = value if isinstance(value, list) else [value]
        if not all(type(member) is int for member in members):
            self._refuse(name, "a token id or a list of them", value)
        return [token for token in dict.fromkeys(members) if 0 <= token < vocab_size]

    def _get(self, name: str, default: Any) -> Any:
        value = self.content.get(name)
        if value is None and default is REQUIRED:
            raise ModelError(f"{self.where} has no entry {name!r}")
        return default if value is None else value

    def _refuse(self, name: str, wanted: str, value: Any) -> Any:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise ModelError(f"{self.where}: {name} must be {wanted}, got {shown}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: the file holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error})") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content
