"""The mutant bank of `stages/course/tools/wrong_versions.py`, and the tests that notice.

`killers.json` remembers which test has killed each mutant. That one runs first and saves the others, most of the time; if it
passes, or is no more, all tests of the task run.
"""

from __future__ import annotations

import json
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

    The mutant stands in the learner's file, and the rest of the stage is as in the reference.

    Raises:
        CourseError: the mutant cannot be made, or its tests cannot be run.
    """
    task = next((task for task in stage.tasks if task.id == mutant.task), None)
    if task is None:
        raise CourseError(f"mutant {mutant.name}: stage {stage.number} has no task {mutant.task}")
    if mutant.file not in stage.files:
        raise CourseError(f"mutant {mutant.name}: {mutant.file} is no file of stage {stage.number}, so nobody will write this")
    room.solve(stage.number)
    room.write(room.path(stage.number, mutant.file), mutate(mutant, room.reference(mutant.file)))
    remembered = known_killers().get(f"{mutant.task} {mutant.name}")
    selections = [room.tests(task)] if remembered is None else [f"{room.tests(task)}::{remembered}", room.tests(task)]
    for tests in selections:
        results = room.run(str(stage.number), [tests], "-x", test_limit=TEST_LIMIT)
        if not results.complaint and results.failed:
            break
    room.solve(stage.number)
    if results.complaint or any(test.name == "(import)" for test in results.tests):
        text = results.complaint or results.tests[0].text
        raise CourseError(f"mutant {mutant.name}: the tests of task {mutant.task} could not be run: {text}")
    return next(iter(results.failed), None)


@cache
def known_killers() -> dict[str, str]:
    """Task and mutant → the test that killed it when that was last remembered."""
    found: dict[str, str] = json.loads(KILLERS.read_text(encoding="utf-8"))
    return found


def remember(killers: dict[str, str]) -> None:
    """Keep which test has killed which mutant, beside what is known of others."""
    known = dict(sorted((known_killers() | killers).items()))
    KILLERS.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
