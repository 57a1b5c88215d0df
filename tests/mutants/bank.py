"""The mutant bank: wrong versions of the reference that learners and real engines have written, and the tests that notice.

Each ``stageN.toml`` here lists ``[[mutant]]`` tables: `name`, the `task` whose tests must kill it, `file` inside `solutions/`,
`why` somebody writes it and what it does to users, and the `old` text that stands there once with the `new` one in its place.
`ties`, which may be left out, lists what it shows to be tested: a trap of the guide by its title, or ``function: Error`` or
``function: number`` of what a docstring promises. `tests/gate_ties.py` compares that with what there is.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path

from stages.course.tools.catalog import CourseError, Stage
from stages.course.tools.runner import TestResult
from stages.course.tools.targets import is_python
from tests.classroom import Classroom

TEST_LIMIT = 10
"""Seconds for one test on a mutant, which may loop for ever; the tests themselves take a second or two."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One wrong version of one place in the reference."""

    name: str
    task: str
    file: str
    why: str
    old: str
    new: str
    ties: list[str] = field(default_factory=list)


def load_mutants(root: Path, stage: Stage) -> list[Mutant]:
    """The mutants of a stage in the repository at `root`; none if it has no list.

    Raises:
        CourseError: an entry is malformed.
    """
    path = root / "tests" / "mutants" / f"stage{stage.number}.toml"
    if not path.exists():
        return []
    names = {field.name for field in fields(Mutant)}
    mutants = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("mutant", []):
        if entry.keys() | {"ties"} != names:
            odd = ", ".join(sorted(names.symmetric_difference(entry.keys() | {"ties"})))
            raise CourseError(f"{path.name}, mutant {entry.get('name')!r}: missing or unknown: {odd}")
        mutants.append(Mutant(**entry))
    return mutants


def mutate(mutant: Mutant, text: str) -> str:
    """The wrong version of a file.

    Raises:
        CourseError: the old text is not there exactly once, or the new one is no Python where it should be.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise CourseError(f"mutant {mutant.name}: its old text stands {count} times in solutions/{mutant.file}, not once")
    wrong = text.replace(mutant.old, mutant.new)
    if not is_python(mutant.file):
        return wrong
    try:
        compile(wrong, mutant.file, "exec")
    except SyntaxError as error:
        raise CourseError(f"mutant {mutant.name}: its new text is no Python: {error.msg}") from error
    return wrong


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
    results = room.run(str(stage.number), [room.tests(task)], "-x", test_limit=TEST_LIMIT)
    room.solve(stage.number)
    if results.complaint or any(test.name == "(import)" for test in results.tests):
        text = results.complaint or results.tests[0].text
        raise CourseError(f"mutant {mutant.name}: the tests of task {mutant.task} could not be run: {text}")
    return next(iter(results.failed), None)
