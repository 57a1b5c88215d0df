"""Cases of one test of which `make test` runs a few, and `make test-slow` the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(quick: int, cases: Iterable[Any]) -> list[Any]:
    """For `pytest.mark.parametrize`: the cases, with a mark `slow` on those after the first `quick`. A test that takes several
    values has a tuple for each case."""
    given = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=pytest.mark.slow if index >= quick else ()) for index, case in enumerate(given)]
