"""Rules of the gate that read the course without running it. See `tests/gate.py`."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

from stages.course.tools.catalog import Stage, Task
from stages.course.tools.targets import parse
from stages.make_starters import render
from tests.classroom import Classroom

TESTS_PER_TASK = 4
HINTS = 3
FIRST_HINT = 200
"""Characters that a first hint may have: a nudge, which also stands in the starter."""
SHORTEST_HINT = 20
MINUTES = range(20, 61)
"""What a task may take a good engineer."""
SHORTEST_SECTION = 400
"""Characters below which a section of the guide explains nothing."""


def starters_are_fresh(room: Classroom, stage: Stage) -> list[str]:
    """The stage's files in the working tree are what the reference gives now."""
    complaints = []
    for file in stage.files:
        path = room.root / room.path(stage.number, file)
        if not path.exists() or path.read_text(encoding="utf-8") != render(room.reference(file), file, stage.tasks):
            complaints.append(f"{room.path(stage.number, file)} is not what the reference gives; run: make starters")
    return complaints


def files_have_one_owner(room: Classroom, stage: Stage) -> list[str]:
    """No file belongs to two stages, no function to two tasks, and no test file, anchor or id to two of anything."""
    complaints = []
    for other in room.course:
        if other.number < stage.number:
            complaints += [
                f"{file} is in stage {other.number} and in stage {stage.number}; leave it to one of them"
                for file in sorted(set(stage.files).intersection(other.files))
            ]
    earlier = [task for other in room.course if other.number < stage.number for task in other.tasks]
    for number, task in enumerate(stage.tasks):
        if task.stage != stage.number:
            complaints.append(f"task {task.id} stands in stage {stage.number}; its id begins with the stage's number")
            continue
        for other_task in [*earlier, *stage.tasks[:number]]:
            shared = [f"{target.file}:{target.name}" for target in task.targets if target in other_task.targets]
            shared += [name for name in ("id", "guide") if getattr(task, name) == getattr(other_task, name)]
            shared += ["tests"] if room.tests(task) == room.tests(other_task) else []
            complaints += [f"tasks {other_task.id} and {task.id} share {what}; give each its own" for what in shared]
    return complaints


def tasks_are_complete(room: Classroom, stage: Stage) -> list[str]:
    """Every task has functions to write, three tiers of hints, points, a purpose and a time; the stage has a README."""
    complaints = []
    if not (room.folder / room.path(stage.number, "README.md")).exists():
        complaints.append(f"{room.path(stage.number, 'README.md')} is missing; say what the stage builds, and in which order")
    for task in stage.tasks:
        if not task.targets:
            complaints.append(f"task {task.id} asks for no function; give it targets")
        if task.points <= 0 and not task.starred:
            complaints.append(f"task {task.id} gives {task.points} points; give it some")
        if task.minutes not in MINUTES:
            complaints.append(f"task {task.id} takes {task.minutes} minutes; cut it to {MINUTES[0]} to {MINUTES[-1]}")
        if len(task.purpose) < SHORTEST_HINT:
            complaints.append(f"task {task.id} does not say what it is for; write its purpose")
        complaints += _about_hints(task)
    return complaints


def _about_hints(task: Task) -> list[str]:
    hints = task.hints
    if len(hints) != HINTS:
        return [f"task {task.id} has {len(hints)} hints; write {HINTS}, from a nudge to nearly the answer"]
    complaints = []
    if len(set(hints)) < HINTS:
        complaints.append(f"task {task.id} says a hint twice; each must say more than the one before")
    complaints += [
        f"hint {number} of task {task.id} says nothing: {hint!r}; write it"
        for number, hint in enumerate(hints, 1)
        if len(hint) < SHORTEST_HINT
    ]
    if len(hints[0]) > FIRST_HINT:
        complaints.append(f"the first hint of task {task.id} has {len(hints[0])} characters; a nudge has at most {FIRST_HINT}")
    return complaints


def guide_has_sections(room: Classroom, stage: Stage) -> list[str]:
    """The stage's chapter has a section for every task, at the anchor that every message of the course points to."""
    path = room.folder / stage.chapter
    if not path.exists():
        return [f"{stage.chapter} is missing; write it"]
    # from each anchor to the next
    sections = re.split(r'<a (?:id|name)="([^"]+)">', path.read_text(encoding="utf-8"))
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    complaints = []
    for task in stage.tasks:
        if task.guide not in texts:
            complaints.append(f'{stage.chapter} has no <a id="{task.guide}"></a>; write the section of task {task.id}')
        elif len(texts[task.guide]) < SHORTEST_SECTION or not re.search(r"^#+ ", texts[task.guide], re.MULTILINE):
            complaints.append(f"the section {task.guide} of {stage.chapter} has no heading or hardly a text; write it")
    return complaints


def functions_of_tests(path: Path) -> list[ast.FunctionDef]:
    """All tests of a file."""
    nodes = ast.walk(parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def tests_are_explained(room: Classroom, stage: Stage) -> list[str]:
    """Every task has enough tests, and each says what it checks and why that matters: the learner's page prints both."""
    complaints = []
    for task in stage.tasks:
        name = room.tests(task)
        path = room.folder / name
        if not path.exists():
            complaints.append(f"{name} is missing; write the tests of task {task.id}")
            continue
        functions = functions_of_tests(path)
        if len(functions) < TESTS_PER_TASK:
            complaints.append(f"{name} has {len(functions)} tests; a task needs {TESTS_PER_TASK}")
        for function in functions:
            what, mark, why = inspect.cleandoc(ast.get_docstring(function) or "").partition("\n\nWhy: ")
            if not what.strip() or what.startswith("Why: "):
                complaints.append(f"{name}: {function.name} does not say what it checks; write a docstring")
            if not mark or not why.strip():
                complaints.append(f'{name}: {function.name} does not say why it matters; end its docstring with "Why: ..."')
    return complaints


def tests_import_only_stages(room: Classroom, stage: Stage) -> list[str]:
    """A stage's tests know the learner's engine as `stages`; `solutions` or a helper elsewhere would test other code."""
    complaints = []
    for path in sorted((room.folder / room.path(stage.number, "tests")).rglob("*.py")):
        for node in ast.walk(parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = ["." * node.level + (node.module or "")]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                modules = [node.value] if re.fullmatch(r"solutions(\.\w+)+", node.value) else []
            for module in modules:
                if module.split(".")[0] in ("solutions", "tests", ""):
                    name = path.relative_to(room.folder)
                    complaints.append(f"{name}, line {node.lineno}, imports {module}; import from stages, as the others do")
    return complaints
