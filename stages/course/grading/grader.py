"""Grades submissions: which tasks are run, on which version of the files, and what comes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages.course.grading import scoring
from stages.course.grading.breaking import Shot, points, shoot_all, versions
from stages.course.grading.journal import Journal
from stages.course.grading.offences import offences
from stages.course.grading.performance import Bench
from stages.course.grading.scoring import Failure, Grade, TaskGrade
from stages.course.grading.submission import Submission
from stages.course.grading.task_runs import ENDED_EARLY, Expected, Runner, TaskRun, failures, passed, suspicions
from stages.course.tools.catalog import CourseError, Stage, Task
from stages.course.tools.runner import task_points

LONGEST_PRINTED = 2000
"""Characters of what a stopped process printed."""
OnStep = Callable[[str], None]


class Grader:
    """Grades one submission after the other by the same measure.

    Args:
        runner: runs the tests. tasks: those that count, each with its stage.
        bench: measures; None: no points for performance.
        jobs: tasks that are tested at once. journal: what was tested before a stop; None: every run starts anew.
    """

    def __init__(
        self, runner: Runner, tasks: list[tuple[Stage, Task]], bench: Bench | None = None, jobs: int = 1,
        journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self.runner, self.tasks, self.bench, self.jobs, self.journal = runner, tasks, bench, jobs, journal
        self.workshop = runner.workshop
        self._expected: dict[str, Expected] = {}

    def steps(self, submissions: list[Submission]) -> int:
        """How often `on_step` will be called, by `prepare` and by `grade` for all of them."""
        measures = len(self.bench.measures) if self.bench else 0
        return len(self.tasks) + len(submissions) * (len(self.tasks) + measures)

    def prepare(self, submissions: list[Submission], on_step: OnStep) -> dict[str, str]:
        """Run the reference on each task that anybody has written, to know what can be passed on this machine.

        Returns:
            Task → why it cannot be graded here.
        """

        def learn(pair: tuple[Stage, Task]) -> None:
            stage, task = pair
            on_step(f"the reference, task {task.id}")
            if not task.targets:
                return
            written = (not self.workshop.placeholders(stage, task, _texts(item, stage)) for item in submissions)
            if task.id not in self._expected and any(written):
                known = self.journal.expected(task) if self.journal else None
                self._expected[task.id] = known or self.runner.expected(stage, task)
                if self.journal and known is None:
                    self.journal.keep_expected(task, self._expected[task.id])

        self._each(learn)
        return {task_id: expected.complaint for task_id, expected in self._expected.items() if expected.complaint}

    def grade(self, submission: Submission, on_step: OnStep) -> Grade:
        """Test and measure a submission."""
        begin, grade, lock = time.monotonic(), Grade(submission.name, notes=list(submission.notes)), threading.Lock()
        flags = self._flags(submission)
        grade.flags = [
            f"stages/{self._stage(number).folder}/{file}, {text}" for (number, file), found in flags.items() for text in found
        ]
        done: dict[str, TaskGrade] = {}

        def test(pair: tuple[Stage, Task]) -> None:
            stage, task = pair
            on_step(f"{submission.name}, task {task.id}")
            found = [f"{target.file}, {text}" for target in task.targets for text in flags.get((stage.number, target.file), ())]
            if task.targets:
                result = self._task(submission, stage, task, list(dict.fromkeys(found)))
            else:
                result = self._break(submission, stage, task)
            with lock:
                done[task.id] = result

        self._each(test)
        grade.tasks = [done[task.id] for _, task in self.tasks]
        grade.flags += [f"task {item.task.id}: {told}" for item in grade.tasks for told in item.flags]
        if self.bench is not None:
            for measure in self.bench.measures:
                on_step(f"{submission.name}, {measure.title}")
                grade.measures.append(self.bench.grade(measure, submission, grade))
        grade.seconds = round(time.monotonic() - begin, 1)
        return grade

    def _each(self, work: Callable[[tuple[Stage, Task]], None]) -> None:
        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in [pool.submit(work, pair) for pair in self.tasks]:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _stage(self, number: int) -> Stage:
        return next(stage for stage in self.workshop.course if stage.number == number)

    def _flags(self, submission: Submission) -> dict[tuple[int, str], list[str]]:
        found = {}
        for (number, file), text in submission.files.items():
            wrong = offences(text, file, self.workshop.starter(self._stage(number), file))
            if wrong:
                found[number, file] = wrong
        return found

    def _task(self, submission: Submission, stage: Stage, task: Task, flags: list[str]) -> TaskGrade:
        texts = _texts(submission, stage)
        grade = TaskGrade(stage, task, scoring.UNWRITTEN, task.points)
        missing = self.workshop.placeholders(stage, task, texts)
        if flags:
            grade.status, grade.reason = scoring.FLAGGED, "; ".join(flags)
        elif missing:
            grade.reason = f"not written yet: {', '.join(missing)}"
        else:
            known = self.journal.grade(stage, task, texts) if self.journal else None
            if known is not None:
                return known
            self._run(grade, texts, self._expected[task.id])
            if self.journal:
                self.journal.keep_grade(task, texts, grade)
        return grade

    def _break(self, submission: Submission, stage: Stage, task: Task) -> TaskGrade:
        """Try the learner's own tests on right and wrong versions of a stage."""
        grade = TaskGrade(stage, task, scoring.UNWRITTEN, task.points, reason="no test of their own")
        tests = submission.breaking.get(stage.number)
        if tests is None:
            return grade
        texts = {task.tests: tests}
        known = self.journal.grade(stage, task, texts) if self.journal else None
        if known is not None:
            return known
        begin = time.monotonic()
        try:
            drawn = versions(self.workshop, stage, scoring.seed_of(self.runner.salt, task.id))
            shots = shoot_all(drawn, lambda version: self.runner.shoot(stage, version, tests))
        except CourseError as error:
            grade.reason = str(error)
            return grade
        grade.points, grade.passed, grade.tests = points(shots), sum(shot.hit for shot in shots), len(drawn)
        grade.status = scoring.PASSED if grade.points == task.points else scoring.PARTLY if grade.points else scoring.FAILED
        grade.reason = "" if grade.points == task.points else f"{grade.passed} of {grade.tests} versions are told right"
        grade.failures = [told(shot) for shot in shots if not shot.hit]
        grade.printed = "" if shots[0].hit else shots[0].output[-LONGEST_PRINTED:]
        grade.seconds = round(time.monotonic() - begin, 1)
        if self.journal:
            self.journal.keep_grade(task, texts, grade)
        return grade

    def _run(self, grade: TaskGrade, texts: dict[str, str], expected: Expected) -> None:
        """Test a task that is written, and enter what comes of it."""
        stage, task = grade.stage, grade.task
        if expected.complaint:
            grade.status, grade.max_points, grade.reason = scoring.SKIPPED, 0, expected.complaint
            return
        limits = self.runner.limits_for(expected)
        alone = self.workshop.alone(stage, task, texts)
        best = self.runner.run(stage, task, alone, expected.moved, limits)
        runs = [best]
        grade.seconds = best.ended.seconds
        # A learner's functions may share data that the reference's do not know: then they pass on their own ground only.
        if passed(best, expected) != expected.tests and best.ended.normal and alone != texts:
            own = self.runner.run(stage, task, texts, expected.moved, limits)
            runs.append(own)
            grade.seconds += own.ended.seconds
            best = max((best, own), key=lambda run: passed(run, expected).total())
        self._enter(grade, best, expected)
        grade.flags = list(dict.fromkeys(told for run in runs for told in suspicions(run, expected)))
        if grade.flags:
            grade.status, grade.points, grade.reason = scoring.FLAGGED, 0, "; ".join(grade.flags)

    def _enter(self, grade: TaskGrade, run: TaskRun, expected: Expected) -> None:
        grade.passed, grade.tests = passed(run, expected).total(), expected.count
        grade.points = task_points(grade.max_points, grade.passed, grade.tests)
        grade.failures = failures(run, expected)
        grade.seconds = round(grade.seconds, 1)
        if grade.passed == grade.tests:
            grade.status, grade.failures = scoring.PASSED, []
            return
        grade.status = scoring.PARTLY if grade.passed else scoring.FAILED
        grade.reason = f"{grade.passed} of {grade.tests} tests pass"
        early = any(ENDED_EARLY in failure.text for failure in grade.failures)
        if early or not run.ended.normal:
            grade.status, grade.printed = scoring.STOPPED, run.ended.output[-LONGEST_PRINTED:]
            grade.reason += f"; {ENDED_EARLY if early else run.ended.how}"
            if run.verdict.running:
                grade.reason += f"; {run.verdict.running} was running"


def told(shot: Shot) -> Failure:
    """A version that the tests took for what it is not."""
    if shot.version.wrong is None:
        return Failure(shot.version.name, "a right version passes", f"False alarm: {shot.failed} fails on it.")
    return Failure(shot.version.name, "a wrong version is noticed", f"All tests pass; look at task {shot.version.wrong.task}.")


def _texts(submission: Submission, stage: Stage) -> dict[str, str]:
    """A submission's files of a stage by their path in it."""
    return {file: text for (number, file), text in submission.files.items() if number == stage.number}


def hidden_folders(root: Path, checkouts: list[Path], output: Path) -> tuple[Path, ...]:
    """What no graded code may read: the reference, everybody's files, and the grades."""
    names = ("solutions", "stages", "tests", ".git")
    return (*(folder / name for folder in (root, *checkouts) for name in names), output)
