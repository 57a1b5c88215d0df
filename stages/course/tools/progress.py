"""How far a learner is in the whole course."""

from __future__ import annotations

import json

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from stages.course.tools.catalog import OPEN, ROOT, Stage
from stages.course.tools.page import MARKS, extra_line, places, run_with_bar
from stages.course.tools.preflight import inspect_stage
from stages.course.tools.runner import PASSED, SKIPPED, TODO
from stages.course.tools.state import SCOREBOARD, remember, remembered


def show_progress(console: Console, course: list[Stage]) -> None:
    """Print a bar for each stage, its tasks, and the next file to open. Runs the tests of the stages that have changed.

    A stage without any but extras, the warm-up, gives no points, and is not what comes next.
    """
    table = Table(title="Your course", title_justify="left")
    for name in ("stage", "tasks", "", "points"):
        table.add_column(name)
    next_task, extras = None, []
    for stage in course:
        states = remembered(stage)
        if not states:
            remember(run_with_bar(console, stage, list(stage.tasks), stage.own))
            states = remembered(stage)
        counted = stage.core or stage.tasks
        done = [task for task in counted if states[task.id]["state"] == PASSED]
        marks = " ".join(
            f"{MARKS[states[task.id]['state']].split()[0]}[/] {task.id}{'★' if task.starred and stage.core else ''}"
            for task in stage.tasks
        )
        bar = ProgressBar(total=len(counted), completed=len(done), width=20)
        points = f"{sum(task.points for task in done)}/{stage.points}" if stage.core else "optional"
        table.add_row(f"{stage.number} {stage.title}", marks, bar, points)
        if not stage.core:
            continue
        extras += [task for task in stage.tasks if task.starred and states[task.id]["state"] == TODO]
        left = [task for task in stage.core if states[task.id]["state"] not in (PASSED, SKIPPED)]
        if next_task is None and left:
            next_task = stage, left[0]
    console.print(table)
    if files := [path.relative_to(ROOT).as_posix() for stage in course for path in sorted(stage.path.glob(OPEN))]:
        rows = json.loads(SCOREBOARD.read_text(encoding="utf-8")) if SCOREBOARD.exists() else []
        console.print(f"open tasks, without points, in {' and '.join(files)}; rows in your table: {len(rows)}; make scoreboard")
    if next_task is None:
        console.print("[green]All stages pass.[/]")
        for task in extras:
            console.print(extra_line(task))
        return
    stage, task = next_task
    console.print(f"next: task {task.id}, {task.title}; open {places(stage, task, inspect_stage(stage))[0]}")
    console.print(f"      make test-stage-{stage.number} TASK={task.id}")
