"""What a learner sees after a run: a table of tasks, what failed and why, and where to go on."""

from __future__ import annotations

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from stages.course.tools.catalog import Stage, Target, Task
from stages.course.tools.preflight import Inspection, Problem
from stages.course.tools.runner import FAILED, PASSED, SKIPPED, TODO, StageResult, TaskResult, TestResult, run_stage

MARKS = {PASSED: "[green]✓ passed[/]", FAILED: "[red]✗ failed[/]", TODO: "[dim]☐ to do[/]", SKIPPED: "[yellow]– skipped[/]"}
SHOWN_FAILURES = 2
"""Failed tests of one task that are shown in full; the others are named."""


def run_with_bar(console: Console, stage: Stage, tasks: list[Task], stages: str) -> StageResult:
    """`run_stage` with a bar that shows how many tests are done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"testing stage {stage.number}", total=None)
        return run_stage(
            stage, tasks, stages, on_test=lambda done, total: progress.update(bar, completed=done, total=total or None)
        )


def print_stage(console: Console, result: StageResult, inspection: Inspection, whose: str) -> None:
    """Print the page of one stage's run.

    Args:
        whose: says whose code was tested.
    """
    concerned = {item.task.id for item in result.tasks}
    problems = [problem for problem in inspection.problems if concerned.intersection(problem.tasks)]
    console.print()
    console.print(task_table(result, whose))
    for problem in problems:
        console.print(problem_panel(problem))
    if result.timed_out:
        console.print("[red]The tests were stopped: a test hung where its own time limit could not reach it.[/]")
    failed = [item for item in result.tasks if item.state == FAILED]
    shadowed = {task for problem in problems for task in problem.tasks}
    for item in failed:
        if item.task.id not in shadowed:
            console.print(failure_panel(item))
            break
    skipped = [item for item in result.tasks if item.state == SKIPPED]
    for item in skipped:
        console.print(f"[yellow]Task {item.task.id} cannot be tested on this machine: {escape(item.tests[0].text)}[/]")
    if result.left:
        console.print(next_panel(result.stage, result.left[0], inspection))
    else:
        count = sum(item.state == PASSED for item in result.tasks)
        console.print(f"[green]All {count} tasks{' that can be tested here' if skipped else ''} pass.[/]")
        for item in result.tasks:
            if item.state == TODO:
                console.print(extra_line(item.task))
    if not any(item.tests for item in result.tasks):
        console.print(escape(result.output.strip()))


def task_table(result: StageResult, whose: str) -> Table:
    """The tasks of a run with tests and points."""
    table = Table(title=f"Stage {result.stage.number} · {result.stage.title} ({whose})", title_justify="left")
    for name, justify in (("", "left"), ("task", "left"), ("", "left"), ("tests", "right"), ("points", "right")):
        table.add_column(name, justify=justify)
    for item in result.tasks:
        tests = f"{item.num_passed}/{len(item.tests)}"
        points = "★" if item.task.starred else f"{item.points}/{item.task.points}"
        table.add_row(MARKS[item.state], item.task.id, item.task.name, tests, points)
    table.add_section()
    points = sum(item.points for item in result.tasks)
    table.add_row("", "", "", "", f"{points}/{sum(item.task.points for item in result.tasks)}")
    return table


def problem_panel(problem: Problem) -> Panel:
    """Something to mend before the tests can say more."""
    return Panel(escape(str(problem)), title="mend this first", border_style="red", title_align="left")


def failure_panel(item: TaskResult) -> Panel:
    """The first failed tests of a task in full, the others by name."""
    failed = [test for test in item.tests if test.outcome == FAILED]
    parts = [_failure(test) for test in failed[:SHOWN_FAILURES]]
    if len(failed) > SHOWN_FAILURES:
        parts.append("and: " + ", ".join(escape(test.name) for test in failed[SHOWN_FAILURES:]))
    title = f"task {item.task.id}: {len(failed)} of {len(item.tests)} tests failed"
    return Panel(Group(*parts), title=title, border_style="red", title_align="left")


def _failure(test: TestResult) -> str:
    return f"[bold]{escape(test.name)}[/]\n{escape(test.text)}\n"


def next_panel(stage: Stage, item: TaskResult, inspection: Inspection) -> Panel:
    """Where to go on: file and line, what the code is for, the first hint, the guide."""
    task = item.task
    missing = {test.missing for test in item.tests if test.missing and test.missing != task.id}
    rows = [("open", place) for place in places(stage, task, inspection)]
    if missing and item.state == TODO:
        rows.append(("first", f"task {', '.join(sorted(missing))}, on which this one stands and which is not written yet"))
    rows += [("what", task.purpose), ("hint", task.hints[0]), ("", f"make hint TASK={task.id} LEVEL=2")]
    rows.append(("guide", task.section))
    title = f"next: task {task.id}, {task.name} (about {task.minutes} minutes)"
    return Panel(labelled(rows), title=title, border_style="cyan", title_align="left")


def extra_line(task: Task) -> str:
    """A starred task that is not written, and how to begin it."""
    return f"[yellow]★[/] an extra if you like: task {task.id}, {task.title}: make test-stage-{task.stage} TASK={task.id}"


def labelled(rows: list[tuple[str, str]]) -> Table:
    """Texts, each with a word before it that says what it is."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for label, text in rows:
        grid.add_row(label, escape(text))
    return grid


def places(stage: Stage, task: Task, inspection: Inspection) -> list[str]:
    """``file:line functions``, a line a file, of what is left to write of a task; of everything when all is written."""
    by_file: dict[str, list[Target]] = {}
    for target in inspection.open_targets(task) or task.targets:
        by_file.setdefault(target.file, []).append(target)
    return [
        f"stages/{stage.folder}/{file}:{inspection.lines.get(targets[0], 1)}  {', '.join(target.name for target in targets)}"
        for file, targets in by_file.items()
    ]
