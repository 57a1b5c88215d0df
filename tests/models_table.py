"""The table in docs/models.md: which feature of the engine works for which family of models, from the tests that ran.

``python -m tests.models_table`` runs the test of every cell (solutions/tests/test_families.py), which takes minutes, and writes
the table. If one fails, it writes nothing and exits with 1.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from solutions.models.config.families import FAMILIES
from solutions.tests.test_families import FEATURES, REFUSED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- from here on: python -m tests.models_table -->\n", "<!-- to here -->\n"

Cell = tuple[str, str]
"""A family, by transformers' ``model_type``, and a feature."""


class Outcomes:
    """A plugin of pytest that notes how the test of each cell ended."""

    def __init__(self) -> None:
        self.passed: dict[Cell, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "::test_cell[" in report.nodeid:
            family, feature = report.nodeid.split("::test_cell[")[1].removesuffix("]").split("-", 1)
            self.passed[family, feature] = report.passed


def cells() -> list[Cell]:
    return [(family.model_type, feature) for feature in FEATURES for family in FAMILIES.values()]


def table(passed: dict[Cell, bool]) -> str:
    """Markdown: a row for each feature, a column for each family, and what the refusals say.

    Raises:
        ValueError: the test of a cell has not passed.
    """
    if missing := [cell for cell in cells() if not passed.get(cell)]:
        raise ValueError(f"no test has passed for {', '.join(map(str, missing[:5]))} and {max(0, len(missing) - 5)} more")
    names = [family.model_type for family in FAMILIES.values()]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for feature in FEATURES:
        marks = ("no" if (name, feature) in REFUSED else "yes" for name in names)
        lines.append(f"| {feature} | {' | '.join(marks)} |")
    lines += ["", "Each *no* is an error, or a slower way, that says:", ""]
    lines += [f'- {name}, {feature}: "{message}"' for (name, feature), message in REFUSED.items()]
    return "\n".join(lines) + "\n"


def shown() -> str:
    """The table as the page has it."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    outcomes = Outcomes()
    pytest.main(["-q", str(ROOT / "solutions/tests/test_families.py"), "-k", "test_cell"], plugins=[outcomes])
    try:
        made = table(outcomes.passed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"{PAGE} is written, from {len(outcomes.passed)} tests")


if __name__ == "__main__":
    main()
