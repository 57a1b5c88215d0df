"""Points: what a task's tests and a measurement are worth, and what a whole submission has."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from stages.course.tools.catalog import Stage, Task

PASSED, PARTLY, FAILED, UNWRITTEN, FLAGGED, STOPPED, SKIPPED = (
    "passed", "partly", "failed", "not written", "not counted", "stopped", "not graded",
)  # fmt: skip
RULE = (
    "A task gives its points by the share of its tests that pass, rounded down to whole points, and none while one of its\n"
    "functions is still the placeholder. Its tests run with the reference's version of the other tasks and, if some fail,\n"
    "once more on the learner's own; the better run counts. A file that uses the reference or reaches for the tests gives\n"
    "none to its tasks. Tests that cannot run on this machine are left out for everybody. A starred task gives no points."
)


@dataclass(frozen=True, slots=True)
class Failure:
    """A test that did not pass: its name, what it checks, and what the learner is told."""

    name: str
    what: str
    text: str


@dataclass(slots=True)
class TaskGrade:
    """A task's result.

    Attributes:
        status: one of the words above. reason: why it is not "passed", in a sentence.
        passed, tests: numbers of tests. seconds: what the tests took. flags: what speaks against believing them.
        printed: the end of what a process printed that did not come to its own end.
    """

    stage: Stage
    task: Task
    status: str
    max_points: int
    points: int = 0
    passed: int = 0
    tests: int = 0
    reason: str = ""
    failures: list[Failure] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0
    printed: str = ""


def points_of(item: TaskGrade) -> str:
    """Its points of those that can be had; a star where there are none to have."""
    return "★" if item.task.starred else f"{item.points}/{item.max_points}"


def left(tasks: list[TaskGrade]) -> list[TaskGrade]:
    """What does not pass, without the starred tasks that nobody has begun."""
    return [item for item in tasks if item.status != PASSED and not (item.task.starred and item.status == UNWRITTEN)]


@dataclass(slots=True)
class MeasureGrade:
    """A measurement's result; `ratios` are the learner's values over the reference's, 1 is as good."""

    name: str
    title: str
    why: str
    status: str
    max_points: int
    points: float = 0.0
    ratio: float | None = None
    ratios: list[float] = field(default_factory=list)
    mine: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    unit: str = ""
    reason: str = ""
    seconds: float = 0.0


@dataclass(slots=True)
class Grade:
    """All that is known of one submission."""

    name: str
    tasks: list[TaskGrade] = field(default_factory=list)
    measures: list[MeasureGrade] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def points(self) -> float:
        return round(sum(item.points for item in (*self.tasks, *self.measures)), 2)

    @property
    def max_points(self) -> int:
        return sum(item.max_points for item in (*self.tasks, *self.measures))

    @property
    def percent(self) -> float:
        return round(100 * self.points / self.max_points, 1) if self.max_points else 0.0

    def of_stage(self, number: int) -> list[TaskGrade]:
        """The tasks of a stage."""
        return [item for item in self.tasks if item.stage.number == number]


def ratio_points(points: int, ratio: float, full_at: float, none_below: float) -> float:
    """Points for a measurement: all from `full_at` of the reference on, none below `none_below`, linear between."""
    share = (ratio - none_below) / (full_at - none_below)
    return round(points * min(1.0, max(0.0, share)), 1)


def seed_of(salt: str, task_id: str) -> str:
    """The hidden seed of a task; nobody can tell it without the salt."""
    return hashlib.sha256(f"{salt}\0{task_id}".encode()).hexdigest()[:16]
