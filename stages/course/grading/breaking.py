"""Break it yourself: a learner's own tests are tried on five wrong versions that nobody names, and on right ones.

The wrong ones are drawn by a seed from those of the bank that break a promise: a trap of the guide, an error or a number of a
docstring. Tests that fail on a right version, which may look unusual, prove nothing about a wrong one.

Points are for versions of tasks with points: who has left a starred task out has not read its promises. Those of the starred
tasks are a game of their own, for none.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import BREAK_IT, GUIDE, CourseError, Stage, Task
from stages.course.tools.runner import NO_PLUGINS
from stages.course.tools.wrong_versions import RIGHT, Mutant, load_mutants, load_others, mutate

WRONG, POINTS, MINUTES = 5, 10, 60
SECONDS = 120
"""What the tests may take on one version."""
PYTEST = ["-m", "pytest", "-q", "-x", "--color=no", "--tb=short", "-rfE", *NO_PLUGINS]
KERNELS = (".cu", ".cpp", "_triton.py")
"""What ends the names of files that need a compiler or an interpreter of kernels; these are left out."""


@dataclass(frozen=True, slots=True)
class Version:
    """A stage's files by path, and what is wrong with them; None: nothing."""

    name: str
    texts: dict[str, str]
    wrong: Mutant | None = None


@dataclass(frozen=True, slots=True)
class Shot:
    """The learner's tests on one version. `failed` is the first that failed, or ""; `output` is what they printed."""

    version: Version
    failed: str
    output: str = ""

    @property
    def hit(self) -> bool:
        """Whether the tests say what is true."""
        return bool(self.failed) == (self.version.wrong is not None)


def exercises(root: Path, stage: Stage) -> list[Task]:
    """The task at the end of a stage, which asks for no function; none where there is no file for it."""
    if not (root / "stages" / stage.folder / BREAK_IT).exists():
        return []
    purpose = "A test is worth what it finds. You write them for an engine that somebody else has broken."
    name, title = f"{stage.number}.B", "Break it yourself"
    return [Task(name, title, (), BREAK_IT, GUIDE, "break-it-yourself", POINTS, MINUTES, purpose, ())]


def versions(workshop: Workshop, stage: Stage, seed: str, starred: bool = False) -> list[Version]:
    """The reference, right versions that look unusual, and wrong ones.

    Args:
        starred: of the starred tasks; else of those with points.

    Raises:
        CourseError: the stage has none of those.
    """
    whole = {file: workshop.reference(file) for file in stage.files}

    def changed(name: str, mutant: Mutant, wrong: Mutant | None) -> Version:
        return Version(name, whole | {mutant.file: mutate(mutant, whole[mutant.file])}, wrong)

    asked = {task.id for task in stage.tasks if task.starred == starred}
    known = [each for each in load_mutants(workshop.root, stage) if each.ties and not each.file.endswith(KERNELS)]
    known = [each for each in known if each.task in asked]
    if not known:
        raise CourseError(f"stage {stage.number} has no {'starred ' if starred else ''}task that somebody has broken")
    right = [each for each in load_others(workshop.root, stage, RIGHT) if each.task in asked]
    return [
        Version("the reference", whole),
        *(changed(f"right version {number}", each, None) for number, each in enumerate(right, 1)),
        *(changed(f"wrong version {number}", each, each) for number, each in enumerate(_draw(known, seed, stage), 1)),
    ]


def _draw(known: list[Mutant], seed: str, stage: Stage) -> list[Mutant]:
    """`WRONG` of them, each of another task; where there are too few tasks, they come round again."""
    dice = random.Random(f"{seed} {stage.number}")
    tasks = sorted({each.task for each in known})
    order = dice.sample(tasks, min(WRONG, len(tasks)))
    drawn: list[Mutant] = []
    while len(drawn) < min(WRONG, len(known)):
        for task in order[: WRONG - len(drawn)]:
            left = [each for each in known if each.task == task and each not in drawn]
            drawn += [dice.choice(left)] if left else []
    return drawn


def fill(workshop: Workshop, folder: Path, stage: Stage, version: Version, tests: str) -> Path:
    """Build a course in an empty folder in which a version takes the learner's place; the path of the learner's tests in it."""
    workshop.build(folder, stage, version.texts)
    path = folder / "stages" / stage.folder / BREAK_IT
    path.write_text(tests, encoding="utf-8")
    return path


def first_failure(code: int | None, output: str) -> str:
    """The first test that failed by what pytest ended with and printed; "" if all passed.

    Raises:
        CourseError: there are no tests, or all are skipped.
    """
    if code == 5:
        raise CourseError(f"there is no test in {BREAK_IT} yet; see {GUIDE}#break-it-yourself")
    if code == 0 and not re.search(r"\b\d+ passed\b", output):
        raise CourseError(f"no test in {BREAK_IT} runs to its end: all are skipped, are expected to fail, or end the process")
    if code == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) \S+?(?:::(.+?))?(?: - |$)", output, re.MULTILINE)
    return found[1] if found and found[1] else "the file as a whole"


def shoot_all(drawn: list[Version], shoot: Callable[[Version], Shot]) -> list[Shot]:
    """Try a learner's tests on versions, the reference first. If they fail on that, the others are not tried."""
    shots: list[Shot] = []
    for version in drawn:
        shots.append(shoot(version))
        if not shots[0].hit:
            break
    return shots


def points(shots: list[Shot]) -> int:
    """Points for the wrong versions that were noticed; none if a right one was refused."""
    wrong = [shot for shot in shots if shot.version.wrong is not None]
    if any(not shot.hit for shot in shots if shot.version.wrong is None) or not wrong:
        return 0
    return POINTS * sum(shot.hit for shot in wrong) // len(wrong)


def break_it(console: Console, workshop: Workshop, stage: Stage, level: int, starred: bool = False) -> int:
    """Try the learner's tests on all versions, and print what came of it.

    Args:
        level: 0: nothing is said of those that live; 1: their tasks; 2: what is wrong with them.
        starred: versions of the starred tasks, for no points.

    Raises:
        CourseError: there are no tests, or all are skipped, or the stage has no starred task.
    """
    name = f"stages/{stage.folder}/{BREAK_IT}"
    path = workshop.root / name
    if not path.exists():
        raise CourseError(f"{name} is gone; restore it with: git checkout -- {name}")
    tests = path.read_text(encoding="utf-8")

    def shoot(version: Version) -> Shot:
        with console.status(f"your tests on {version.name}"):
            return _shoot(workshop, stage, version, tests)

    shots = shoot_all(versions(workshop, stage, str(workshop.root), starred), shoot)
    title = f"stage {stage.number}, break it yourself" + (" ★" if starred else "")
    table = Table("", "your tests", title=title, title_justify="left")
    for shot in shots:
        version = shot.version
        if version.wrong is None:
            said = f"[red]false alarm: {escape(shot.failed)}[/]" if shot.failed else "[green]pass, as they should[/]"
        else:
            said = f"[green]notice it: {escape(shot.failed)}[/]" if shot.failed else f"[red]all pass[/] {_hint(version, level)}"
        table.add_row(version.name, said)
    if not shots[0].hit:
        console.print(escape(shots[0].output), soft_wrap=True)
    console.print(table)
    if starred:
        console.print("all told right" if points(shots) == POINTS else "not all told right", "(starred tasks give no points)")
    else:
        console.print(f"{points(shots)} of {POINTS} points")
    return 0 if points(shots) == POINTS else 1


def _shoot(workshop: Workshop, stage: Stage, version: Version, tests: str) -> Shot:
    with tempfile.TemporaryDirectory() as name:
        path = fill(workshop, Path(name), stage, version, tests)
        environment = os.environ | {"STAGES": str(stage.number), "PYTHONPATH": name}
        command = [sys.executable, *PYTEST, str(path)]
        try:
            ended = subprocess.run(
                command, cwd=name, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return Shot(version, f"more than {SECONDS} s")
    return Shot(version, first_failure(ended.returncode, ended.stdout), ended.stdout)


def _hint(version: Version, level: int) -> str:
    assert version.wrong is not None
    said = ["", f"(task {version.wrong.task})", f"(task {version.wrong.task}: {version.wrong.why})"]
    return escape(said[min(level, 2)])
