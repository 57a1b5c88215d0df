"""The mutant bank of `stages/course/tools/wrong_versions.py`, and the tests that notice.

`killers.json` remembers which test has killed each mutant. That one runs first and saves the others, most of the time; if it
passes, or is no more, all tests of the task run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from stages.course.tools.catalog import CourseError, Stage
from stages.course.tools.runner import TestResult
from stages.course.tools.wrong_versions import Mutant, mutate
from tests.classroom import Classroom

KILLERS = Path(__file__).with_name("killers.json")
"""Task and mutant → test, as ``python -m tests.gate --remember`` writes it."""
TEST_LIMIT = 10
"""Seconds for one test on a mutant, which may loop for ever; the tests themselves take a second or two."""


def killer(room: Classroom, stage: Stage, mutant: Mutant) -> TestResult | None:
    """The first test of the mutant's task that fails on it, or None: it survives.

    Raises:
        CourseError: the mutant cannot be made, or its tests cannot be run.
    """
    with wrong(room, stage, mutant) as tests:
        remembered = known_killers().get(f"{mutant.task} {mutant.name}")
        for selection in [tests] if remembered is None else [f"{tests}::{remembered}", tests]:
            results = room.run(str(stage.number), [selection], "-x", test_limit=TEST_LIMIT)
            if not results.complaint and results.failed:
                break
    if results.complaint or any(test.name == "(import)" for test in results.tests):
        text = results.complaint or results.tests[0].text
        raise CourseError(f"mutant {mutant.name}: the tests of task {mutant.task} could not be run: {text}")
    return next(iter(results.failed), None)


def quickest_killer(room: Classroom, stage: Stage, mutant: Mutant) -> str | None:
    """The test of the mutant's task that fails on it in the least time, by name. Many fail by waiting for what never comes.

    Raises:
        CourseError: the mutant cannot be made.
    """
    with wrong(room, stage, mutant) as tests:
        results = room.run(
            str(stage.number), [tests], "--durations=0", "--durations-min=0.0", limit=1200, test_limit=TEST_LIMIT
        )
    seconds: dict[str, float] = {}
    for took, name in re.findall(r"^([0-9.]+)s (?:call|teardown) +\S+?::(.+?)$", results.ended.output, re.MULTILINE):
        seconds[name] = seconds.get(name, 0.0) + float(took)
    return min((test.name for test in results.failed if test.name in seconds), key=seconds.__getitem__, default=None)


@contextmanager
def wrong(room: Classroom, stage: Stage, mutant: Mutant) -> Iterator[str]:
    """Let the mutant stand in the learner's file, the rest of the stage being as in the reference; gives its task's tests.

    Raises:
        CourseError: it cannot be made.
    """
    task = next((task for task in stage.tasks if task.id == mutant.task), None)
    if task is None:
        raise CourseError(f"mutant {mutant.name}: stage {stage.number} has no task {mutant.task}")
    if mutant.file not in stage.files:
        raise CourseError(f"mutant {mutant.name}: {mutant.file} is no file of stage {stage.number}, so nobody will write this")
    room.solve(stage.number)
    room.write(room.path(stage.number, mutant.file), mutate(mutant, room.reference(mutant.file)))
    try:
        yield room.tests(task)
    finally:
        room.solve(stage.number)


@cache
def known_killers() -> dict[str, str]:
    """Task and mutant → the test that killed it when that was last remembered."""
    found: dict[str, str] = json.loads(KILLERS.read_text(encoding="utf-8"))
    return found


def remember(killers: dict[str, str]) -> None:
    """Keep which test has killed which mutant, beside what is known of others."""
    known = dict(sorted((known_killers() | killers).items()))
    KILLERS.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
