"""Runs a stage's tests in a process of their own and sorts the results by task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stages.course.tools.catalog import ROOT, CourseError, Stage, Task

STAGE_TIME_LIMIT = 600
"""Seconds for all tests of a stage, should one hang where its own time limit cannot reach it."""

NO_PLUGINS = [f"-pno:{name}" for name in ("anyio", "cacheprovider", "nbmake", "platformdirs", "schemathesis", "xdist")]
"""Leaves out what no stage's test needs and takes longer to load than most tests to run."""

PASSED, FAILED, TODO, SKIPPED = "passed", "failed", "todo", "skipped"


def task_points(points: int, passed: int, tests: int) -> int:
    """Points for a part of a task's tests, rounded down."""
    return points * passed // tests if tests else 0


@dataclass(slots=True)
class TestResult:
    """One test. `outcome` is passed, failed, todo or skipped.

    Todo means that it met the placeholder of task `missing`, skipped that this machine cannot run it; `text` says why.
    """

    __test__ = False  # for pytest, which takes it for a class of tests by its name
    name: str
    task: str
    what: str
    outcome: str
    text: str = ""
    missing: str = ""


@dataclass(slots=True)
class TaskResult:
    """All tests of one task."""

    task: Task
    tests: list[TestResult] = field(default_factory=list)

    @property
    def num_passed(self) -> int:
        return sum(test.outcome == PASSED for test in self.tests)

    @property
    def state(self) -> str:
        """Passed when every test is; skipped when this machine can run none; todo when all that keeps it from passing is code
        that is not written yet."""
        if self.tests and all(test.outcome == SKIPPED for test in self.tests):
            return SKIPPED
        if self.tests and self.num_passed == len(self.tests):
            return PASSED
        return FAILED if any(test.outcome == FAILED for test in self.tests) else TODO

    @property
    def points(self) -> int:
        """What the grader gives for these results; more if the rest fails for want of another task's functions."""
        if any(test.outcome == TODO and test.missing == self.task.id for test in self.tests):
            return 0
        return task_points(self.task.points, self.num_passed, sum(test.outcome != SKIPPED for test in self.tests))


@dataclass(slots=True)
class StageResult:
    """The tasks that were tested, in order, and pytest's own output for what is in none of them."""

    stage: Stage
    tasks: list[TaskResult]
    output: str
    timed_out: bool = False

    @property
    def left(self) -> list[TaskResult]:
        """What keeps the stage from being green. A starred task that is not begun does so only if it was tested alone."""
        extra = any(not result.task.starred for result in self.tasks)
        left = [result for result in self.tasks if result.state not in (PASSED, SKIPPED)]
        return [result for result in left if not (extra and result.task.starred and result.state == TODO)]

    @property
    def passed(self) -> bool:
        return not self.left


def run_stage(
    stage: Stage, tasks: list[Task], stages: str, *, on_test: Callable[[int, int], None] = lambda done, total: None,
    time_limit: float = STAGE_TIME_LIMIT,
) -> StageResult:  # fmt: skip
    """Run the tests of some tasks of a stage.

    Args:
        stages: value of `STAGES`, which says whose code is tested; "" is the reference.
        on_test: called with (tests done, tests in all) as they come in.

    Raises:
        CourseError: a test file is not there.
    """
    files = [stage.path / task.tests for task in tasks]
    for file in files:
        if not file.exists():
            raise CourseError(f"{file.relative_to(ROOT)} is gone; restore it with: git checkout -- {file.relative_to(ROOT)}")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "--color=no", "--tb=native", *NO_PLUGINS, *map(str, files)]
        environment = os.environ | {"STAGES": stages, "COURSE_RESULTS": str(log), "PYTHONPATH": str(ROOT)}
        with (Path(folder) / "output.txt").open("w+", encoding="utf-8") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            timed_out = _wait(process, log, on_test, time.monotonic() + time_limit)
            output.seek(0)
            text = output.read()
        records = _records(log)
    results = {task.id: TaskResult(task) for task in tasks}
    for record in records:
        if "task" in record and record["task"] in results:
            outcome = record["outcome"] if record["outcome"] in (PASSED, TODO, SKIPPED) else FAILED
            results[record["task"]].tests.append(
                TestResult(record["test"], record["task"], record["what"], outcome, record["text"], record.get("missing", ""))
            )
    return StageResult(stage, list(results.values()), text, timed_out)


def _wait(process: subprocess.Popen, log: Path, on_test: Callable[[int, int], None], deadline: float) -> bool:
    """Wait for the end, telling how far the tests are; returns whether the time ran out."""
    try:
        while True:
            try:
                process.wait(timeout=0.2)
                return False
            except subprocess.TimeoutExpired:
                records = _records(log)
                total = next((record["collected"] for record in records if "collected" in record), 0)
                on_test(sum("task" in record for record in records), total)
            if time.monotonic() > deadline:
                return True
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _records(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").split("\n")[:-1]  # the last line may be half written
    return [json.loads(line) for line in lines]
