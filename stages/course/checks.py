"""Comparisons for the stages' tests. A failure shows the first entries that differ, the expected beside the learner's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the first tasks' tests need no PyTorch, which takes seconds to import
    from torch import Tensor

SHOWN = 5
"""Differing entries that a failure shows."""


def check_equal(actual: Any, expected: Any, what: str) -> None:
    """Compare numbers, strings, lists, dictionaries, arrays or tensors exactly.

    Args:
        what: names the thing in the failure, such as "block table of sequence 2".

    Raises:
        AssertionError: they differ; the message shows where.
    """
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [*expected, *(key for key in actual if key not in expected)]
        _compare(what, keys, [expected.get(k, "nothing") for k in keys], [actual.get(k, "nothing") for k in keys])
    elif _is_row(expected) and _is_row(actual):
        ours, theirs = _entries(expected), _entries(actual)
        if len(ours) != len(theirs):
            raise AssertionError(f"{what}: {len(ours)} entries expected, yours has {len(theirs)}\n{_both(expected, actual)}")
        _compare(what, list(range(len(ours))), ours, theirs)
    elif actual != expected or isinstance(actual, bool) != isinstance(expected, bool):
        raise AssertionError(f"{what}:\n{_both(expected, actual)}")


def check_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Compare tensors up to rounding: each entry within ``tolerance * (1 + |expected|)``.

    Raises:
        AssertionError: shapes differ, an entry is not finite where it should be, or one is too far off.
    """
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(expected.shape)} expected, yours is {list(actual.shape)}")
    difference = (actual.double() - expected.double()).abs()
    wrong = ~(difference <= tolerance * (1 + expected.double().abs()))  # NaN is wrong too
    if wrong.any():
        places = wrong.nonzero().tolist()
        rows = [(place, f"{expected[tuple(place)]:.6g}", f"{actual[tuple(place)]:.6g}") for place in places[:SHOWN]]
        raise AssertionError(f"{what}: {len(places)} of {wrong.numel()} entries differ\n{_table(rows)}")


def _is_array(value: Any) -> bool:
    """Whether it is an array of NumPy or a tensor, with at least one dimension."""
    return hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or _is_array(value)


def _entries(value: Any) -> list[Any]:
    return value.tolist() if _is_array(value) else list(value)


def _compare(what: str, keys: list[Any], expected: list[Any], actual: list[Any]) -> None:
    rows = [(key, a, b) for key, a, b in zip(keys, expected, actual, strict=True) if a != b]
    if rows:
        raise AssertionError(f"{what}: {len(rows)} of {len(keys)} entries differ\n{_table(rows[:SHOWN])}")


def _both(expected: Any, actual: Any) -> str:
    return f"  expected {_short(expected)}\n  yours    {_short(actual)}"


def _table(rows: list[tuple[Any, Any, Any]]) -> str:
    cells = [("at", "expected", "yours"), *((str(key), _short(a), _short(b)) for key, a, b in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _short(value: Any) -> str:
    text = repr(value.tolist() if _is_array(value) else value)
    return text if len(text) <= 100 else text[:97] + "..."
