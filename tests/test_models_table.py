"""docs/models.md: the table is of the families, features and refusals that are tested, and only tests that passed make one."""

from __future__ import annotations

import re

import pytest

from solutions.models.config.families import FAMILIES
from solutions.tests.test_families import FEATURES, REFUSED
from tests.models_table import Outcomes, cells, shown, table


def test_the_page_shows_what_the_tests_of_today_ask_for() -> None:
    """A new family, feature or refusal needs a new run."""
    assert shown() == table(dict.fromkeys(cells(), True))
    assert len(cells()) == len(FAMILIES) * len(FEATURES) == len(re.findall(r"\| (?=yes|no)", shown()))
    assert len(re.findall(r"\| no", shown())) == len(REFUSED)


@pytest.mark.parametrize("outcome", [False, None])
def test_no_table_without_a_test_that_passed(outcome: bool | None) -> None:
    passed: dict[tuple[str, str], bool] = dict.fromkeys(cells(), True)
    del passed["qwen3", "GGUF"]
    if outcome is not None:
        passed["qwen3", "GGUF"] = outcome
    with pytest.raises(ValueError, match=r"no test has passed for \('qwen3', 'GGUF'\) and 0 more"):
        table(passed)


def test_outcomes_are_those_of_the_cells() -> None:
    outcomes = Outcomes()
    for name, outcome, when in [
        ("test_cell[qwen3-n-gram drafts]", "passed", "call"),
        ("test_cell[qwen3-GGUF]", "failed", "call"),
        ("test_cell[qwen3-GGUF]", "passed", "teardown"),
        ("test_cell[gpt2-int8]", "skipped", "setup"),
        ("test_a_crowded_engine[qwen3]", "passed", "call"),
    ]:
        outcomes.pytest_runtest_logreport(pytest.TestReport(f"a.py::{name}", ("a.py", 1, name), {}, outcome, None, when))
    assert outcomes.passed == {("qwen3", "n-gram drafts"): True, ("qwen3", "GGUF"): False}
