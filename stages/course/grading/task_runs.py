"""Runs a task's tests in a sandbox, on the reference to know what there is to pass, and on a learner's files."""

from __future__ import annotations

import json
import secrets
import sys
from collections import Counter
from dataclasses import dataclass, field, replace

from stages.course.grading.breaking import PYTEST, Shot, Version, fill, first_failure
from stages.course.grading.channel import read_records
from stages.course.grading.guard import OWN_TESTS
from stages.course.grading.sandbox import Ended, Limits, Sandbox, room
from stages.course.grading.scoring import Failure, seed_of
from stages.course.grading.seeds import move, offset
from stages.course.grading.verdict import TestRecord, Verdict, against, judge
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import Stage, Task

PLUGINS = ("pytest_timeout", "_hypothesis_pytestplugin", "stages.course.grading.witness", "no:cacheprovider")
"""All that the stages' tests need; pytest loads no other, which takes longer than most tests to run. -s: what they print
counts as the process's output at once."""
FLAGS = ["-q", "-s", "--color=no", "--tb=native", "--disable-warnings", *(f"-p{plugin}" for plugin in PLUGINS)]
SLOWER = 5
"""How many times as long as the reference a learner's tests may take, beside the time that they have anyhow."""
ENDED_EARLY = "the process ended before all tests had run"


@dataclass(frozen=True, slots=True)
class TaskRun:
    """A run of a task's tests: the results that were reported, and how the process ended."""

    verdict: Verdict
    ended: Ended

    @property
    def records(self) -> list[TestRecord]:
        return self.verdict.records

    def names(self, outcome: str) -> Counter[str]:
        """How often each test had this outcome."""
        return Counter(record.name for record in self.records if record.outcome == outcome)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference does on this machine: the tests that a learner's files must pass, each with how often it runs.

    Attributes:
        complaint: why the tests say nothing about anybody here, or "".
        compared: how often each test compares. flags: what would speak against the reference.
        moved: tests run in another order and with other seeds; only where the reference passes so.
    """

    tests: Counter[str]
    seconds: float
    complaint: str = ""
    compared: Counter[str] = field(default_factory=Counter)
    flags: frozenset[str] = frozenset()
    moved: bool = True

    @property
    def count(self) -> int:
        return self.tests.total()


class Runner:
    """Runs tests with one salt.

    Args:
        limits: for a task's tests; the time is the least that each task has.
    """

    def __init__(self, workshop: Workshop, sandbox: Sandbox, salt: str, limits: Limits) -> None:
        self.workshop, self.sandbox, self.salt, self.limits = workshop, sandbox, salt, limits

    def expected(self, stage: Stage, task: Task) -> Expected:
        """Run the tests on the reference; a second time, as they stand, if some fail."""
        limits = self.limits.within(10 * self.limits.seconds)
        moved = True
        run = self.run(stage, task, None, moved, limits)
        if run.names("failed") or not run.verdict.done:
            moved = False
            run = self.run(stage, task, None, moved, limits)
        if run.names("failed") or run.names("todo") or not run.verdict.done:
            failed = next((record for record in run.records if record.outcome in ("failed", "todo")), None)
            why = f"{failed.name}: {failed.text}" if failed else f"{run.ended.how}\n{run.ended.output[-2000:]}"
            return Expected(Counter(), run.ended.seconds, f"the reference itself does not pass here: {why}")
        if not run.names("passed"):
            skipped = next((record.text for record in run.records if record.outcome == "skipped"), "there are none")
            return Expected(Counter(), run.ended.seconds, f"its tests cannot run on this machine: {skipped}")
        compared = Counter({record.name: record.compared for record in run.records})
        return Expected(run.names("passed"), run.ended.seconds, "", compared, frozenset(run.verdict.flags), moved)

    def run(
        self, stage: Stage, task: Task, texts: dict[str, str] | None, moved: bool = True, limits: Limits | None = None
    ) -> TaskRun:
        """Run a task's tests on a learner's files of its stage; None: on the reference. `moved` is as in `Expected`."""
        with room() as scratch:
            work = scratch / "work"
            self.workshop.build(work, stage, texts)
            folder = work / "stages" / stage.folder
            log, seed, key = scratch / "results.bin", seed_of(self.salt, task.id), secrets.token_bytes(32)
            if moved:
                move(work, [folder / task.tests], seed)
            command = [sys.executable, "-m", "pytest", *FLAGS, str(folder / task.tests)]
            environment = {
                "STAGES": "" if texts is None else str(stage.number),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONHASHSEED": str(int(seed, 16) % 2**32),
            }  # fmt: skip
            order = json.dumps({"key": key.hex(), "seed": seed, "results": str(log), "shuffled": moved})
            learners = () if texts is None else tuple(folder / file for file in stage.files)
            ended = self.sandbox.run(command, scratch, environment, limits or self.limits, learners, order)
            if ended.lost:
                return TaskRun(Verdict(), ended)
            verdict = judge(*read_records(log, key, ended.normal))
            for piece, shown in (
                (f"{work}/", ""),
                (str(work), ""),
                (str(scratch), "the room"),
                (seed, ""),
                (offset(seed), ""),
                (sys.prefix, "python"),
            ):
                verdict.replace(piece, shown)
                ended = replace(ended, output=ended.output.replace(piece, shown))
            return TaskRun(verdict, ended)

    def shoot(self, stage: Stage, version: Version, tests: str) -> Shot:
        """Run a learner's own tests on a version of a stage, whose text `guard` keeps from them. What they say is all that
        counts, so nobody watches how they say it.

        Raises:
            CourseError: there are no tests, or all are skipped.
        """
        with room() as scratch:
            path = fill(self.workshop, scratch / "work", stage, version, tests)
            environment = {"STAGES": str(stage.number), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", OWN_TESTS: "1"}
            command = [sys.executable, *PYTEST, "-ppytest_timeout", str(path)]
            ended = self.sandbox.run(command, scratch, environment, self.limits, (path,))
            failed = ended.stopped or first_failure(ended.code, ended.output)
            return Shot(version, failed, ended.output.replace(str(scratch), "the room"))

    def limits_for(self, expected: Expected) -> Limits:
        """What a learner's tests may take."""
        return self.limits.within(max(self.limits.seconds, SLOWER * expected.seconds))


def passed(run: TaskRun, expected: Expected) -> Counter[str]:
    """Tests that count as passed: those that the reference passes too, as often, and that never failed beside that."""
    bad = run.names("failed") + run.names("todo")
    return Counter({name: min(count, expected.tests[name]) for name, count in run.names("passed").items() if name not in bad})


def failures(run: TaskRun, expected: Expected) -> list[Failure]:
    """Tests that did not pass, with what they say; those that never ran get the reason of it."""
    good = passed(run, expected)
    told = [Failure(r.name, r.what, r.text) for r in run.records if r.outcome not in ("passed", "skipped")]
    names = {failure.name for failure in told}
    silent = [name for name, count in expected.tests.items() if good[name] < count and name not in names]
    if "(import)" in names:
        return told
    why = ENDED_EARLY if run.ended.normal else run.ended.how
    if run.verdict.running:
        why += f"; {run.verdict.running} was running"
    return told + [Failure(name, "", f"It did not come to a result: {why}") for name in silent]


def suspicions(run: TaskRun, expected: Expected) -> list[str]:
    """What speaks against believing a run."""
    return against(run.verdict, expected.tests, expected.compared, expected.flags)
