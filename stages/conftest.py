"""How the stages' tests run: on whose code, with which time limit, and what a failure looks like."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import stages
from stages.course.tools.catalog import STAGES_FOLDER, Task, load_course, load_warm_up
from stages.course.tools.failure import describe, todo_task, what_and_why
from stages.course.tools.preflight import inspect_stage

TIME_LIMIT = 30
"""Seconds for one test; the slowest takes a few on a laptop."""
TURNS, IDLE, BUSY = 4, 0.05, 0.9
"""Times its limit that a test may take on a busy machine, while it computed for more than the first share of the last turn, and
in all for less than the second. Below the first it waits for something, above the second it has no end."""
COURSE = [*load_warm_up(), *load_course()]


class TimeLimitReached(BaseException):
    """A test took too long. Not an `Exception`: hypothesis would take that for a finding and run the endless test again."""


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Take the place of pytest-timeout's own timer, whose exception hypothesis would catch. A test that computes, and has not
    got the processor for its time, has `TURNS` of it."""

    begun = last = time.process_time()
    turns = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last, turns
        now, turns = time.process_time(), turns + 1
        busy, last = (now - last) / settings.timeout, now
        if turns < TURNS and busy > IDLE and (now - begun) / settings.timeout < BUSY:
            signal.setitimer(signal.ITIMER_REAL, settings.timeout)
            return
        raise TimeLimitReached(f"Timeout (>{settings.timeout:g} s)")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout)
    item.cancel_timeout = lambda: signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def pytest_configure(config: pytest.Config) -> None:
    """Without `STAGES`, take the stages whose tests were asked for, so that an unfinished stage cannot break another's."""
    if "STAGES" in os.environ:
        return
    folders = stages.stage_folders()
    paths = [Path(str(arg).split("::")[0]).resolve() for arg in config.args]
    asked = [number for number, folder in folders.items() if any(path.is_relative_to(folder.resolve()) for path in paths)]
    chosen = asked or sorted(folders)
    os.environ["STAGES"] = ",".join(map(str, chosen))
    stages.__path__[:] = stages.search_path(chosen)


def pytest_report_header() -> str:
    chosen = os.environ["STAGES"]
    return f"your code: stage {chosen}; everything else: the reference" if chosen else "the reference"


def _task_of(path: Path) -> Task | None:
    for stage in COURSE:
        for task in stage.tasks:
            if path == (stage.path / task.tests):
                return task
    return None


class Hooks:
    """Told of results."""

    @staticmethod
    def pytest_course_result(record: dict[str, Any]) -> None:
        """A test of the course came to a result."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_course_result(record: dict[str, Any]) -> None:
    _write(record)


def _write(record: dict[str, Any]) -> None:
    """Add a line to the file that `COURSE_RESULTS` names, if it does."""
    if "COURSE_RESULTS" in os.environ:
        with Path(os.environ["COURSE_RESULTS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


@pytest.hookimpl(trylast=True)  # whoever set another limit has done so by now
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(STAGES_FOLDER)]
    for item in mine:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMIT, method="signal"))
    _write({"collected": len(mine)})


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """A test file that cannot be imported fails with what is wrong in the learner's file, if that can be told; one that says
    itself that it cannot run here is skipped."""
    report = yield
    task = _task_of(collector.path) if report.skipped and isinstance(collector, pytest.Module) else None
    if task is not None:
        text = report.longrepr[2].removeprefix("Skipped: ")
        record = {"test": "(import)", "task": task.id, "what": "", "outcome": "skipped", "text": text}
        collector.config.hook.pytest_course_result(record=record)
    task = _task_of(collector.path) if report.failed and isinstance(collector, pytest.Module) else None
    if task is not None:
        stage = next(stage for stage in COURSE if stage.number == task.stage)
        text = str(report.longrepr)
        if os.environ["STAGES"]:
            problems = [str(problem) for problem in inspect_stage(stage).problems]
            text = "\n\n".join(problems) or text
        report.longrepr = text
        what = "the tests can import your files"
        record = {"test": "(import)", "task": task.id, "what": what, "outcome": "failed", "text": text}
        collector.config.hook.pytest_course_result(record=record)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    task = _task_of(item.path)
    if task is None or (report.passed and call.when != "call"):
        return report
    record = {"test": item.name, "task": task.id, "what": what_and_why(item.function)[0], "outcome": report.outcome, "text": ""}
    if report.skipped:
        record["text"] = str(call.excinfo.value)
    elif report.failed:
        missing = todo_task(call.excinfo.value)
        if missing is not None:
            record |= {"outcome": "todo", "missing": missing}
            report.longrepr = str(call.excinfo.value)
        else:
            report.longrepr = describe(item.function, call.excinfo.value, call.excinfo.tb)
        record["text"] = str(report.longrepr)
    item.config.hook.pytest_course_result(record=record)
    return report
