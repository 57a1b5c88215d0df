"""What `course.toml` lists: stages, tasks, the functions that each task asks for; hints come from files beside it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

STAGES_FOLDER = Path(__file__).parents[2]
ROOT = STAGES_FOLDER.parent
GUIDE = "IMPLEMENTATION_GUIDE.md"
"""The course's text begins here; each stage's chapter lies in the stage's folder."""
CHAPTER, HINTS = "GUIDE.md", "hints.toml"
WARM_UP = "stage0_warm_up"
BREAK_IT = "break_it.py"
"""In a stage's folder: the learner's own tests, see `grading/breaking.py`."""
OPEN = "open_*.py"
"""In a stage's folder: what is handed in for an open task, see `contest/contests.py`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A function that the learner writes.

    Attributes:
        file: path inside `solutions/` and inside the stage's folder.
        name: ``function`` or ``Class.function``.
    """

    file: str
    name: str


@dataclass(frozen=True, slots=True)
class Task:
    """One exercise. `hints` go from a nudge to nearly the answer; `purpose` says what the code is for in the engine.

    A `starred` task is an extra: no points, and its stage is done without it.
    """

    id: str
    title: str
    targets: tuple[Target, ...]
    tests: str
    """File of its tests, relative to the stage's folder."""
    chapter: str
    """File of its stage's chapter, from the repository's root."""
    guide: str
    """Anchor of its section in the chapter."""
    points: int
    minutes: int
    purpose: str
    hints: tuple[str, ...]
    starred: bool = False

    @property
    def stage(self) -> int:
        return int(self.id.split(".")[0])

    @property
    def name(self) -> str:
        """Its title, with a star if it has one."""
        return f"{self.title} ★" if self.starred else self.title

    @property
    def section(self) -> str:
        """Where its section of the guide is, from the repository's root: file and anchor."""
        return f"{self.chapter}#{self.guide}"

    @property
    def marker(self) -> str:
        """What every `NotImplementedError` of this task begins with."""
        return f"Stage {self.stage} · Task {self.id}:"


@dataclass(frozen=True, slots=True)
class Stage:
    """A chapter of the course.

    Attributes:
        folder: name of its folder in `stages/`.
        settings: settings of the engine that let the stage's code be the one that runs in ``make run-mine``.
        given: later stages that write anew what this one's tests stand on, such as the model's layers. Until their time comes
            the reference's are used.
        answers: the finished version of a stage's only file, from the repository's root, where `solutions/` has none.
    """

    number: int
    title: str
    folder: str
    tasks: tuple[Task, ...]
    settings: dict[str, object] = field(default_factory=dict)
    given: tuple[int, ...] = ()
    answers: str = ""

    def reference(self, file: str) -> str:
        """The text of the finished version of a file."""
        return (ROOT / (self.answers or f"solutions/{file}")).read_text(encoding="utf-8")

    @property
    def path(self) -> Path:
        return STAGES_FOLDER / self.folder

    @property
    def own(self) -> str:
        """The value of `STAGES` with which its files are the learner's, and all else is the reference's."""
        return str(self.number or "")

    @property
    def chapter(self) -> str:
        """File of its chapter, from the repository's root."""
        return chapter_of(self.folder)

    @property
    def files(self) -> list[str]:
        """The starter files, in the order in which the tasks meet them."""
        return list(dict.fromkeys(target.file for task in self.tasks for target in task.targets))

    @property
    def core(self) -> tuple[Task, ...]:
        """The tasks without a star: with them the stage is done."""
        return tuple(task for task in self.tasks if not task.starred)

    @property
    def points(self) -> int:
        return sum(task.points for task in self.tasks)


class CourseError(ValueError):
    """Something about the course or the request is wrong; the message is for the person at the terminal."""


def load_course(path: Path = STAGES_FOLDER / "course.toml") -> list[Stage]:
    """All stages that `course.toml` lists, with the hints of their folders' `hints.toml`.

    Raises:
        CourseError: an entry is malformed.
    """
    stages = []
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["stage"]:
        try:
            hints = _hints(path.parent / entry["folder"] / HINTS)
            tasks = tuple(_task(task, chapter_of(entry["folder"]), hints.get(task["id"], [])) for task in entry["task"])
            settings, given = entry.get("settings", {}), tuple(entry.get("given", []))
            stages.append(Stage(entry["number"], entry["title"], entry["folder"], tasks, settings, given))
        except (KeyError, TypeError, ValueError) as error:
            raise CourseError(f"{path.name}, stage {entry.get('number')}: {error!r}") from error
    return stages


def load_warm_up(folder: Path = STAGES_FOLDER / WARM_UP) -> list[Stage]:
    """The warm-up as stage 0, whose tasks are all extras; nothing where there is none. No other stage needs it, so it is not
    among those of `load_course`."""
    if not folder.exists():
        return []
    hints = _hints(folder / HINTS)
    entries = tomllib.loads((folder / "tasks.toml").read_text(encoding="utf-8"))["task"]
    chapter = f"{STAGES_FOLDER.name}/{WARM_UP}/README.md"
    tasks = tuple(_task(entry, chapter, hints[entry["id"]]) for entry in entries)
    return [Stage(0, "Warm-up", WARM_UP, tasks, answers="tests/warm_up_answers.py")]


def chapter_of(folder: str) -> str:
    """File of the chapter in a stage's folder, from the repository's root."""
    return f"{STAGES_FOLDER.name}/{folder}/{CHAPTER}"


def _hints(path: Path) -> dict[str, list[str]]:
    """Task → its hints; none where there is no file."""
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _task(entry: dict, chapter: str, hints: list[str]) -> Task:
    targets = []
    for text in entry["targets"]:
        file, _, name = text.partition(":")
        targets.append(Target(file, name))
    starred = entry.get("starred", False)
    return Task(
        entry["id"], entry["title"], tuple(targets), entry["tests"], chapter, entry["guide"],
        0 if starred else entry["points"], entry["minutes"], " ".join(entry["purpose"].split()),
        tuple(" ".join(hint.split()) for hint in hints), starred,
    )  # fmt: skip


def find_stage(course: list[Stage], number: int) -> Stage:
    """The stage of this number.

    Raises:
        CourseError: there is none.
    """
    for stage in course:
        if stage.number == number:
            return stage
    raise CourseError(f"there is no stage {number}; there are {', '.join(str(stage.number) for stage in course)}")


def find_task(course: list[Stage], task_id: str) -> Task:
    """The task of this id, such as "1.3".

    Raises:
        CourseError: there is none.
    """
    tasks = [task for stage in course for task in stage.tasks]
    for task in tasks:
        if task.id == task_id:
            return task
    raise CourseError(f"there is no task {task_id!r}; write for example TASK={tasks[0].id} (up to {tasks[-1].id})")
