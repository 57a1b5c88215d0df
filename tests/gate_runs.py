"""Rules of the gate that run the stages' tests. See `tests/gate.py`."""

from __future__ import annotations

from stages.course.tools.catalog import Stage, Task
from stages.course.tools.runner import PASSED, TODO, TestResult
from tests.classroom import Classroom, Results


def reference_passes(room: Classroom, stage: Stage) -> list[str]:
    """The reference passes every test of the stage: nothing is asked that it does not do."""
    results = _run(room, "", list(stage.tasks))
    return _not_green(results, list(stage.tasks), "on the reference")


def starters_say_what_is_missing(room: Classroom, stage: Stage) -> list[str]:
    """On fresh starters every test fails, and only with the error that names its own task or an earlier one of the stage."""
    room.solve(stage.number, [])
    results = _run(room, str(stage.number), list(stage.tasks))
    complaints = [results.complaint] if results.complaint else []
    for number, task in enumerate(stage.tasks):
        allowed = [earlier.id for earlier in stage.tasks[: number + 1]]
        complaints += _not_todo(results.of(task.id), task, allowed, "on a fresh starter")
    return complaints


def earlier_tasks_suffice(room: Classroom, stage: Stage) -> list[str]:
    """With tasks written one by one, exactly those are green, and the next fails with its own error and no other.

    Hence no task needs a later one. The other stages are the reference's, so no stage needs another's.
    """
    complaints = []
    for number, task in enumerate(stage.tasks):
        done, left = stage.tasks[: number + 1], stage.tasks[number + 1 :]
        room.solve(stage.number, [each.id for each in done])
        state = f"with the tasks up to {task.id} written"
        # Those before it have just been green with less; when all is written everything runs once more.
        green = [task] if left else list(done)
        results = _run(room, str(stage.number), [*green, *left])
        complaints += _not_green(results, green, state)
        for place, each in enumerate(left):
            allowed = [other.id for other in left[: place + 1]]
            complaints += _not_todo(results.of(each.id), each, allowed, state)
    return complaints


def stages_pass_together(room: Classroom, stage: Stage) -> list[str]:
    """Who has done all stages up to this one passes its tests on nothing but their own stack: it needs no later stage.

    Later stages are empty, but for those that `course.toml` gives to this one.
    """
    for other in room.course:
        room.solve(other.number, None if other.number <= stage.number else [])
    numbers = ",".join(str(other.number) for other in room.course if other.number not in stage.given)
    results = _run(room, numbers, list(stage.tasks))
    return _not_green(results, list(stage.tasks), f"with the stages up to {stage.number} written")


def _run(room: Classroom, stages: str, tasks: list[Task]) -> Results:
    """Run the tests of some tasks, as far as there are any: another rule asks for the others."""
    return room.run(stages, [name for name in map(room.tests, tasks) if (room.folder / name).exists()])


def _not_green(results: Results, tasks: list[Task], state: str) -> list[str]:
    complaints = [f"{state}: {results.complaint}"] if results.complaint else []
    for task in tasks:
        if not results.of(task.id):
            complaints.append(f"task {task.id}: no test ran {state}")
        failed = [test for test in results.of(task.id) if test.outcome != PASSED]
        complaints += [f"task {task.id}: {test.name} fails {state}: {_first_line(test)}" for test in failed]
    return complaints


def _not_todo(tests: list[TestResult], task: Task, allowed: list[str], state: str) -> list[str]:
    complaints = [] if tests else [f"task {task.id}: no test ran {state}"]
    for test in tests:
        if test.outcome != TODO:
            says = "passes" if test.outcome == PASSED else f"fails with something else: {_first_line(test)}"
            complaints.append(f"task {task.id}: {test.name} {says} {state}; let it call a function of its task first")
        elif test.missing not in allowed:
            complaints.append(
                f"task {task.id}: {test.name} needs task {test.missing} {state}; a test may need only its own and earlier ones"
            )
    return complaints


def _first_line(test: TestResult) -> str:
    lines = [line.strip() for line in test.text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("checks ", "why "))] or lines
    return lines[0] if lines else "no message"
