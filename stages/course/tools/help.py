"""Help for one task: hints, the reference beside the learner's version, and starting over."""

from __future__ import annotations

import difflib

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from stages.course.tools.catalog import ROOT, CourseError, Stage, Target, Task
from stages.course.tools.page import labelled, places
from stages.course.tools.preflight import inspect_stage
from stages.course.tools.runner import PASSED, run_stage
from stages.course.tools.state import back_up
from stages.course.tools.targets import find_lines, function_source, is_python
from stages.make_starters import digest, read_manifest, starters, write_starters

SIDE_BY_SIDE = 150
"""Columns of a terminal from which on two versions stand beside each other."""


def show_hint(console: Console, stage: Stage, task: Task, level: int) -> None:
    """Print the hints of a task up to a level.

    Raises:
        CourseError: there is no such level.
    """
    if not 1 <= level <= len(task.hints):
        raise CourseError(f"task {task.id} has hints of level 1 to {len(task.hints)}, not {level}")
    rows = [("open", place) for place in places(stage, task, inspect_stage(stage))]
    rows += [(f"hint {number}", task.hints[number - 1]) for number in range(1, level + 1)]
    if level < len(task.hints):
        rows.append(("", f"make hint TASK={task.id} LEVEL={level + 1}"))
    rows.append(("guide", task.section))
    console.print(Panel(labelled(rows), title=f"task {task.id}, {task.name}", border_style="cyan", title_align="left"))


def show_diff(console: Console, stage: Stage, task: Task, force: bool) -> None:
    """Print the reference's functions beside the learner's, once the task's tests pass.

    Raises:
        CourseError: they do not pass yet, and `force` is off.
    """
    if not force:
        with console.status(f"running the tests of task {task.id}"):
            result = run_stage(stage, [task], stage.own)
        if result.tasks[0].state != PASSED:
            raise CourseError(
                f"task {task.id} does not pass yet ({result.tasks[0].num_passed} of {len(result.tasks[0].tests)} tests); "
                f"try make hint TASK={task.id} LEVEL=2, or see the reference anyway: make diff TASK={task.id} FORCE=1"
            )
    for target in task.targets:
        _print_versions(console, stage, target)


def _print_versions(console: Console, stage: Stage, target: Target) -> None:
    mine = function_source((stage.path / target.file).read_text(encoding="utf-8"), target.file, target.name)
    reference = function_source(stage.reference(target.file), target.file, target.name)
    language = "python" if is_python(target.file) else "cuda"
    title = f"{target.file}: {target.name}"
    if mine == reference:
        console.print(f"[green]{escape(title)} is the same as the reference[/]")
    elif console.width >= SIDE_BY_SIDE:
        table = Table(title=escape(title), title_justify="left", expand=True)
        table.add_column("yours", ratio=1)
        table.add_column("reference", ratio=1)
        table.add_row(*(Syntax(text, language, word_wrap=True, background_color="default") for text in (mine, reference)))
        console.print(table)
    else:
        lines = difflib.unified_diff(mine.splitlines(), reference.splitlines(), "yours", "reference", lineterm="", n=100)
        console.print(Syntax(f"# {title}\n" + "\n".join(lines), "diff", word_wrap=True, background_color="default"))


def changed_files(stage: Stage) -> list[str]:
    """Files of a stage that the learner has written in."""
    manifest = read_manifest()
    changed = []
    for file in stage.files:
        path = stage.path / file
        if path.exists() and digest(path.read_text(encoding="utf-8")) != manifest.get(f"{stage.folder}/{file}"):
            changed.append(file)
    return changed


def reset_stage(console: Console, stage: Stage) -> None:
    """Put fresh starters in the place of a stage's files, after a copy of them."""
    folder = back_up(stage, changed_files(stage))
    write_starters([stage], force=True)
    console.print(f"stage {stage.number} is as at the start; what you had is in {folder.relative_to(ROOT)}")


def reset_task(console: Console, stage: Stage, task: Task) -> None:
    """Empty a task's functions again, after a copy of their files; the rest of the files stays as the learner has it.

    Raises:
        CourseError: a file cannot be read as Python, so nobody can tell where its functions are.
    """
    files = list(dict.fromkeys(target.file for target in task.targets))
    fresh = {file: _with_functions_reset(stage, task, file) for file in files}
    folder = back_up(stage, files)
    for file, text in fresh.items():
        (stage.path / file).write_text(text, encoding="utf-8")
    console.print(f"task {task.id} is as at the start; what you had is in {folder.relative_to(ROOT)}")


def _with_functions_reset(stage: Stage, task: Task, file: str) -> str:
    """The learner's file with the task's functions as they are in the starter."""
    path = stage.path / file
    starter = starters(stage)[file]
    if not path.exists():
        return starter
    text = path.read_text(encoding="utf-8")
    try:
        for name in [target.name for target in task.targets if target.file == file]:
            place = find_lines(text, file, name)
            if place is None:
                raise CourseError(
                    f"{name} is gone from stages/{stage.folder}/{file}; make reset-stage-{stage.number} starts over"
                )
            lines = text.splitlines()
            lines[place] = function_source(starter, file, name).splitlines()
            text = "\n".join(lines) + "\n"
    except SyntaxError as error:
        raise CourseError(
            f"stages/{stage.folder}/{file}, line {error.lineno}: {error.msg}; mend it, or start the stage over: "
            f"make reset-stage-{stage.number}"
        ) from error
    return text
