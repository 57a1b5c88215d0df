"""Runs a task's tests in a sandbox, on the reference to know what there is to pass, and on a learner's files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stages.course.grading.sandbox import Ended, Limits, Sandbox, room
from stages.course.grading.scoring import Failure, seed_of
from stages.course.grading.workshop import Workshop
from stages.course.tools.catalog import Stage, Task

PLUGINS = ("pytest_timeout", "_hypothesis_pytestplugin", "stages.course.grading.seeds", "no:cacheprovider")
"""All that the stages' tests need; pytest loads no other, which takes longer than most tests. -s: what they print
counts as the process's output at once."""
FLAGS = ["-q", "-s", "--color=no", "--tb=native", "--disable-warnings", *(f"-p{plugin}" for plugin in PLUGINS)]
SLOWER = 5
"""How many times as long as the reference a learner's tests may take, beside the time that they have anyhow."""
ENDED_EARLY = "the process ended before all tests had run"
LONGEST_RECORDS, LONGEST_TEXT = 8 << 20, 8000
"""Bytes of results that are read, and characters of each text; a hostile file could write more."""


@dataclass(frozen=True, slots=True)
class TestRecord:
    """A test that came to a result. `outcome` is passed, failed, skipped or todo."""

    name: str
    what: str
    outcome: str
    text: str


@dataclass(frozen=True, slots=True)
class TaskRun:
    """A run of a task's tests: the results that were reported, and how the process ended."""

    records: tuple[TestRecord, ...]
    ended: Ended

    def names(self, outcome: str) -> Counter[str]:
        """How often each test had this outcome."""
        return Counter(record.name for record in self.records if record.outcome == outcome)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference does on this machine: the tests that a learner's files must pass, each with how often it runs.

    Attributes:
        complaint: why the tests say nothing about anybody here, or "".
    """

    tests: Counter[str]
    seconds: float
    complaint: str = ""

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
        """Run the tests on the reference; a second time if some fail, which is then the machine's doing."""
        limits = self.limits.within(10 * self.limits.seconds)
        run = self.run(stage, task, None, limits)
        if run.names("failed") or run.ended.code != 0:
            run = self.run(stage, task, None, limits)
        if run.names("failed") or run.names("todo") or run.ended.code != 0:
            failed = next((record for record in run.records if record.outcome in ("failed", "todo")), None)
            why = f"{failed.name}: {failed.text}" if failed else f"{run.ended.how}\n{run.ended.output[-2000:]}"
            return Expected(Counter(), run.ended.seconds, f"the reference itself does not pass here: {why}")
        if not run.names("passed"):
            skipped = next((record.text for record in run.records if record.outcome == "skipped"), "there are none")
            return Expected(Counter(), run.ended.seconds, f"its tests cannot run on this machine: {skipped}")
        return Expected(run.names("passed"), run.ended.seconds)

    def run(self, stage: Stage, task: Task, texts: dict[str, str] | None, limits: Limits | None = None) -> TaskRun:
        """Run a task's tests on a learner's files of its stage; None: on the reference."""
        with room() as scratch:
            work = scratch / "work"
            self.workshop.build(work, stage, texts)
            folder = work / "stages" / stage.folder
            log, seed = scratch / "results.jsonl", seed_of(self.salt, task.id)
            command = [sys.executable, "-m", "pytest", *FLAGS, str(folder / task.tests)]
            environment = {
                "STAGES": "" if texts is None else str(stage.number), "COURSE_RESULTS": str(log), "GRADING_SEED": seed,
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONHASHSEED": str(int(seed, 16) % 2**32),
            }  # fmt: skip
            learners = tuple(folder / file for file in stage.files)
            ended = self.sandbox.run(command, scratch, environment, limits or self.limits, learners)
            return TaskRun(() if ended.lost else tuple(_records(log, task)), ended)

    def limits_for(self, expected: Expected) -> Limits:
        """What a learner's tests may take."""
        return self.limits.within(max(self.limits.seconds, SLOWER * expected.seconds))


def _records(log: Path, task: Task) -> list[TestRecord]:
    """What `stages/conftest.py` wrote, as far as it can be read; a test's last word counts."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        lines = file.read(LONGEST_RECORDS).decode("utf-8", errors="replace").splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
            if record.get("task") == task.id:
                words = (str(record[key])[:LONGEST_TEXT] for key in ("test", "what", "outcome", "text"))
                records.append(TestRecord(*words))
        except (ValueError, KeyError, AttributeError):
            continue
    return records


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
    return told + [Failure(name, "", f"It did not come to a result: {why}") for name in silent]
