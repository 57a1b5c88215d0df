"""A throw-away copy of the course in which to play the learner: write in the starters, run the tests, see what they say.

The starters in it come fresh from the reference; what is in the working tree's may be half a learner's work.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.course.tools.catalog import GUIDE, CourseError, Task, find_stage, load_course
from stages.course.tools.runner import FAILED, NO_PLUGINS, PASSED, TODO, TestResult
from stages.make_starters import render
from tests.warm import Ended, Job, Warm

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pyproject.toml", "constraints.txt", "Makefile", "README.md", GUIDE)
PYTEST = ["-q", "--tb=native", "--disable-warnings", "--color=no", *NO_PLUGINS]
"""How pytest is called."""
NOT_COPIED = ("__pycache__", ".pytest_cache", ".hypothesis")


@dataclass(frozen=True, slots=True)
class Results:
    """What a run of tests gave.

    Attributes:
        tests: in the order in which they ran; with a parameter a test's name ends in ``[...]``.
        ended: how the process ended, with all that pytest printed.
    """

    tests: tuple[TestResult, ...]
    ended: Ended

    def of(self, task_id: str) -> list[TestResult]:
        """The results of one task's tests."""
        return [test for test in self.tests if test.task == task_id]

    def passed(self, task_id: str) -> bool:
        """Whether a task is green: it has tests, and all of them passed."""
        return bool(self.of(task_id)) and all(test.outcome == PASSED for test in self.of(task_id))

    @property
    def failed(self) -> list[TestResult]:
        """All tests that did not pass, those that met a placeholder too."""
        return [test for test in self.tests if test.outcome != PASSED]

    @property
    def complaint(self) -> str:
        """Why the results cannot be trusted, or "": pytest did not come to its end, or found nothing to run."""
        if self.ended.timed_out:
            return "the run was stopped: it took too long"
        if self.ended.code not in (0, 1, 5):  # all passed, some failed, there were none
            last = self.ended.output.strip().splitlines()[-1:] or ["it printed nothing"]
            return f"pytest ended with {self.ended.code}: {last[0]}"
        return "" if self.tests else "there were no tests"


class Classroom:
    """A copy of a course in an empty folder, with fresh starters.

    Args:
        folder: where it comes to be; made if it is not there.
        root: the repository to copy. Its `solutions/` is linked, not copied.
        warm: the server that runs the tests; without it the classroom starts one of its own, which `close` ends.

    Attributes:
        on_starters: stage → what its tests say on its fresh starters; kept for the gate, see `tests/gate_runs.py`.
    """

    def __init__(self, folder: Path, root: Path = ROOT, warm: Warm | None = None) -> None:
        self.folder = folder.resolve()
        self.root = root.resolve()
        self.on_starters: dict[int, Results] = {}
        self._own_warm = warm is None
        self.warm = Warm() if warm is None else warm
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            if (self.root / name).exists():
                shutil.copyfile(self.root / name, self.folder / name)
        (self.folder / "solutions").symlink_to(self.root / "solutions", target_is_directory=True)
        self.course = load_course(self.root / "stages" / "course.toml")
        learner_files = {self.root / "stages" / stage.folder / file for stage in self.course for file in stage.files}

        def skipped(folder: str, names: list[str]) -> list[str]:
            return [name for name in names if name in NOT_COPIED or Path(folder, name) in learner_files]

        shutil.copytree(self.root / "stages", self.folder / "stages", ignore=skipped)
        for stage in self.course:
            self.solve(stage.number, [])

    def close(self) -> None:
        """End what the classroom started; its files stay for whoever made the folder."""
        if self._own_warm:
            self.warm.close()

    def path(self, stage: int, file: str) -> str:
        """Where a stage's file lies, from the classroom's folder."""
        return f"stages/{find_stage(self.course, stage).folder}/{file}"

    def tests(self, task: Task) -> str:
        """Where a task's tests lie, from the classroom's folder."""
        return self.path(task.stage, task.tests)

    def solve(self, stage: int, task_ids: Iterable[str] | None = None) -> None:
        """Write a stage's files as a learner has them who did these tasks as the reference does, and no other.

        Args:
            task_ids: None means all of the stage.
        """
        chosen = find_stage(self.course, stage)
        known = [task.id for task in chosen.tasks]
        done = set(known if task_ids is None else task_ids)
        if not done.issubset(known):
            raise CourseError(f"stage {stage} has no task {', '.join(sorted(done.difference(known)))}")
        left = [task for task in chosen.tasks if task.id not in done]
        for file in chosen.files:
            self.write(self.path(stage, file), render(self.reference(file), file, left))

    def reference(self, file: str) -> str:
        """The text of a file of the reference."""
        path = self.root / "solutions" / file
        if not path.exists():
            raise CourseError(f"course.toml names {file}, which is not in solutions/")
        return path.read_text(encoding="utf-8")

    def read(self, path: str) -> str:
        return (self.folder / path).read_text(encoding="utf-8")

    def write(self, path: str, text: str) -> None:
        """Write a file of the classroom; the path is from its folder."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        # Python tells a stale cache by size and whole seconds, and two versions can agree in both.
        for cached in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            cached.unlink()

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace a piece of a file's text, which must be there exactly once."""
        text = self.read(path)
        if text.count(old) != 1:
            raise ValueError(f"{path} has {text.count(old)} places with {old!r}")
        self.write(path, text.replace(old, new))

    def run(
        self, stages: str | None, tests: Iterable[str], *flags: str, limit: float = 300, test_limit: float | None = None
    ) -> Results:
        """Run files of tests.

        Args:
            stages: value of `STAGES`: whose code is tested; "" is the reference, None leaves the variable unset.
            tests: files, folders or test ids, from the classroom's folder.
            flags: further arguments for pytest.
            limit: seconds for all of them. test_limit: seconds that one may compute; None: what the course gives.
        """
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "results.jsonl"
            # without `STAGES` pytest's settings depend on which tests there are
            settings, free = ([], [*tests]) if stages is not None else ([*tests], [])
            arguments, environment = [*PYTEST, *flags, *settings], {"STAGES": stages}
            results = {"COURSE_RESULTS": str(log)}
            job = Job(str(self.folder), "pytest", arguments, environment, limit, test_limit, free, results)
            ended = self.warm.run(job)
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        return Results(tuple(result(record) for record in map(json.loads, lines) if "task" in record), ended)

    def command(self, module: str, *arguments: str, stages: str | None = None, limit: float = 300, **environment: str) -> Ended:
        """Run ``python -m module arguments`` as a learner does in this clone."""
        variables = {"STAGES": stages, "PYTHONPATH": str(self.folder), "COLUMNS": "120", **environment}
        return self.warm.run(Job(str(self.folder), module, list(arguments), variables, limit))


def result(record: dict) -> TestResult:
    """A line of what `stages/conftest.py` writes for each test."""
    outcome = record["outcome"] if record["outcome"] in (PASSED, TODO) else FAILED
    return TestResult(record["test"], record["task"], record["what"], outcome, record["text"], record.get("missing", ""))
