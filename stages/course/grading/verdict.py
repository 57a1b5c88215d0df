"""What a graded process's signed results say: made here, in the grader's process, where no learner's code runs."""

from __future__ import annotations

import marshal
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

LONGEST_TEXT = 8000
"""Characters of each text; a hostile file could write more."""
CANARY_PASSED = "a test that must fail passed: something decides in the tests' place"
CANARY_LIED = "a test that must fail failed with another word than its own"
DIFFERENT = "passed, though what it compared is not the same"
UNSEEN = "there are passed tests, and none that must fail beside them"


@dataclass(frozen=True, slots=True)
class TestRecord:
    """A test that came to a result. `outcome` is passed, failed, skipped or todo; `compared` is how often it compared."""

    name: str
    what: str
    outcome: str
    text: str
    compared: int = 0


@dataclass(slots=True)
class Verdict:
    """All that can be believed of a run of a task's tests.

    Attributes:
        flags: what speaks against believing the rest, each once.
        running: the test that had begun when the results ended, or "". done: all tests have run.
    """

    records: list[TestRecord] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    running: str = ""
    done: bool = False

    def replace(self, piece: str, shown: str) -> None:
        """Let no text show a piece, such as a path of the machine."""
        self.records = [replace(record, text=record.text.replace(piece, shown)) for record in self.records]

    def flag(self, told: str) -> None:
        """Note what speaks against believing the rest."""
        if told not in self.flags:
            self.flags.append(told)


def judge(records: list[tuple[Any, ...]], complaint: str) -> Verdict:
    """Read the records of `witness`.

    Args:
        complaint: what is wrong with the channel, or "".
    """
    verdict = Verdict(flags=[complaint] if complaint else [])
    differ, canaries = "", 0
    for kind, *values in records:
        if kind == "begin":
            verdict.running, differ = values[0], ""
        elif kind == "compared":
            differ = differ or ("yes" if _differ(*values) else "")
        elif kind == "done":
            verdict.done = True
        elif kind == "flag":
            verdict.flag(values[0])
        elif kind == "canary":
            verdict.running = ""
            _, word, outcome, text = values
            if outcome == "passed":
                verdict.flag(CANARY_PASSED)
            elif outcome == "failed":
                canaries += 1
                if word not in text:
                    verdict.flag(CANARY_LIED)
        elif kind == "result":
            verdict.running = ""
            name, what, text, outcome, compared = values
            if outcome == "passed" and differ:
                verdict.flag(f"{name} {DIFFERENT}")
            verdict.records.append(TestRecord(name, what[:LONGEST_TEXT], outcome, text[:LONGEST_TEXT], compared))
    if not canaries and any(record.outcome == "passed" for record in verdict.records):
        verdict.flag(UNSEEN)
    return verdict


def against(verdict: Verdict, tests: Counter[str], compared: Counter[str], flags: frozenset[str]) -> list[str]:
    """What speaks against a learner's run, beside the reference's on the same cases.

    Args:
        tests: what the reference passes. compared: how often it compares in each. flags: what speaks against it too.
    """
    found = [told for told in verdict.flags if told not in flags]
    for record in verdict.records:
        if record.outcome == "passed" and compared[record.name] and not record.compared:
            found.append(f"{record.name} passes with fewer comparisons than it has")
        if record.outcome == "skipped" and tests[record.name]:
            found.append("it skips its tests")
    return list(dict.fromkeys(found))


def _differ(actual: bytes, expected: bytes) -> bool:
    """Whether two sealed values are not the same; digests are only equal to themselves."""
    if actual == expected:
        return False
    try:
        return bool(marshal.loads(actual) != marshal.loads(expected))
    except (ValueError, EOFError, TypeError):  # at least one is a digest: of texts that may differ in 1 and 1.0
        return False
