"""The toy course with graders of its own, on which honest, wrong and hostile files are tried."""

from __future__ import annotations

from pathlib import Path

from stages.course.grading.grader import Grader, hidden_folders
from stages.course.grading.sandbox import Limits, Sandbox
from stages.course.grading.scoring import Grade
from stages.course.grading.submission import Submission
from stages.course.grading.task_runs import Runner
from stages.course.grading.workshop import Workshop
from tests.toy_course import REFERENCE, make_toy

SUMS = REFERENCE["toys/sums.py"]
SECONDS = 4
"""What a toy's task may take, beside five times what the reference takes; its tests need one."""


def silent(what: str) -> None:
    """Nobody watches the progress here."""


def doubling(code: str) -> str:
    """The toy's file with another body of `double`, which task 1.1 asks for."""
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    return SUMS.replace("    return number + number", lines)


class Toys:
    """The toy course with a grader of its own for each kind of room."""

    def __init__(self, root: Path, starred: str = "") -> None:
        make_toy(root, starred)
        self.workshop = Workshop(root)
        self.tasks = [(stage, task) for stage in self.workshop.course[:1] for task in stage.tasks]
        self.graders = {walls: self.grader(walls) for walls in (True, False)}

    def grader(self, walls: bool, salt: str = "pepper") -> Grader:
        """A grader in namespaces, or without them as on macOS."""
        sandbox = Sandbox(hidden_folders(self.workshop.root, [], self.workshop.root / "grades"))
        if not walls:
            sandbox.__dict__["isolated"] = False
        return Grader(Runner(self.workshop, sandbox, salt, Limits().within(SECONDS)), self.tasks, jobs=2)

    def grade(self, sums: str, walls: bool = False) -> Grade:
        """Grade this file of the first stage."""
        submission = Submission("ada", self.workshop.root, {(1, "toys/sums.py"): sums})
        grader = self.graders[walls]
        assert grader.prepare([submission], silent) == {}
        return grader.grade(submission, silent)


def points(grade: Grade) -> dict[str, int]:
    """Points by task."""
    return {item.task.id: item.points for item in grade.tasks}
