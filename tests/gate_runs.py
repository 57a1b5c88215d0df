"""Rules of the gate that run the stages' tests. See `tests/gate.py`."""

from __future__ import annotations

from stages.course.tools.catalog import Stage, Task
from stages.course.tools.runner import PASSED, TODO, TestResult
from tests.classroom import Classroom, Results

IMPORT = "(import)"
"""How `stages/conftest.py` calls a file that cannot be imported, in place of a test."""


def reference_passes(room: Classroom, stage: Stage) -> list[str]:
    """The reference passes every test of the stage: nothing is asked that it does not do."""
    return _all_green(_run(room, "", list(stage.tasks)), stage, "on the reference")


def starters_say_what_is_missing(room: Classroom, stage: Stage) -> list[str]:
    """On fresh starters every test fails, and only with the error that names its own task or an earlier one of the stage."""
    results = _on_starters(room, stage)
    complaints = [results.complaint] if results.complaint else []
    for number, task in enumerate(stage.tasks):
        allowed = [earlier.id for earlier in stage.tasks[: number + 1]]
        complaints += _not_todo(results.of(task.id), task, allowed, "on a fresh starter")
    return complaints


def earlier_tasks_suffice(room: Classroom, stage: Stage) -> list[str]:
    """With tasks written one by one, exactly those are green, and the next fails with its own error and no other.

    Hence no task needs a later one. The other stages are the reference's, so no stage needs another's.

    A test that has met a task's error goes the same way to it until that task is written. So with each task those tests run
    again that have met its error, and those that have met none; all others say what they said before.
    """
    complaints = []
    said = {task.id: {test.name: test for test in _on_starters(room, stage).of(task.id)} for task in stage.tasks}
    for number, task in enumerate(stage.tasks):
        done, left = stage.tasks[: number + 1], stage.tasks[number + 1 :]
        room.solve(stage.number, [each.id for each in done])
        state = f"with the tasks up to {task.id} written"
        again = [test for each in (task, *left) for test in _to_run_again(room, each, task.id, said[each.id])]
        results = room.run(str(stage.number), again) if again else None
        for each in (task, *left):
            kept = {} if room.tests(each) in again else said[each.id]
            said[each.id] = kept | {test.name: test for test in (results.of(each.id) if results else [])}
        complaints += [f"{state}: {results.complaint}"] if results and results.complaint else []
        complaints += _not_green(list(said[task.id].values()), task, state)
        for place, each in enumerate(left):
            allowed = [other.id for other in left[: place + 1]]
            complaints += _not_todo(list(said[each.id].values()), each, allowed, state)
    return complaints


def _on_starters(room: Classroom, stage: Stage) -> Results:
    """What the tests of a stage say on its fresh starters. Two rules ask; the tests run once."""
    if stage.number not in room.on_starters:
        room.solve(stage.number, [])
        room.on_starters[stage.number] = _run(room, str(stage.number), list(stage.tasks))
    return room.on_starters[stage.number]


def _to_run_again(room: Classroom, task: Task, written: str, said: dict[str, TestResult]) -> list[str]:
    """The tests of a task, by id, that may say something else now that another is written; the whole file if all may."""
    file = room.tests(task)
    names = [test.name for test in said.values() if test.outcome != TODO or test.missing == written]
    if len(names) < len(said) and IMPORT not in names:
        return [f"{file}::{name}" for name in names]
    return [file] if names else []


def stages_pass_together(room: Classroom, stage: Stage) -> list[str]:
    """Who has done all stages up to this one passes its tests on nothing but their own stack: it needs no later stage.

    Later stages are empty, but for those that `course.toml` gives to this one.
    """
    for other in room.course:
        room.solve(other.number, None if other.number <= stage.number else [])
    numbers = ",".join(str(other.number) for other in room.course if other.number not in stage.given)
    return _all_green(_run(room, numbers, list(stage.tasks)), stage, f"with the stages up to {stage.number} written")


def _run(room: Classroom, stages: str, tasks: list[Task]) -> Results:
    """Run the tests of some tasks, as far as there are any: another rule asks for the others."""
    return room.run(stages, [name for name in map(room.tests, tasks) if (room.folder / name).exists()])


def _all_green(results: Results, stage: Stage, state: str) -> list[str]:
    complaints = [f"{state}: {results.complaint}"] if results.complaint else []
    return complaints + [text for task in stage.tasks for text in _not_green(results.of(task.id), task, state)]


def _not_green(tests: list[TestResult], task: Task, state: str) -> list[str]:
    complaints = [] if tests else [f"task {task.id}: no test ran {state}"]
    failed = [test for test in tests if test.outcome != PASSED]
    return complaints + [f"task {task.id}: {test.name} fails {state}: {_first_line(test)}" for test in failed]


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
