"""The rule of the gate that joins what the course promises to the mutants that show it to be tested. See `tests/gate.py`."""

from __future__ import annotations

import ast
import re

from stages.course.tools.catalog import Stage, Task
from stages.course.tools.targets import find_function, is_python, parse
from tests.classroom import Classroom
from tests.mutants.bank import load_mutants


def promises_are_tied(room: Classroom, stage: Stage) -> list[str]:
    """Each trap of the guide, and each error in a docstring's ``Raises:``, stands in the `ties` of a mutant, and each tie names
    one. A bank without any tie is not looked at."""
    ties = {tie for mutant in load_mutants(room.root, stage) for tie in mutant.ties}
    if not ties:
        return []
    bank, complaints, known = f"tests/mutants/stage{stage.number}.toml", [], set()
    for task in stage.tasks:
        found = [*traps(room, stage, task), *errors(room, task)]
        known.update(found)
        complaints += [
            f'task {task.id}: nothing in {bank} is tied to "{each}"; add a mutant' for each in found if each not in ties
        ]
    return complaints + [f'{bank} has a tie to "{each}", which nobody promises' for each in sorted(ties - known)]


def traps(room: Classroom, stage: Stage, task: Task) -> list[str]:
    """The titles of the traps in a task's section of the guide: what is emphasised at the beginning of each."""
    chapter = room.folder / stage.chapter
    text = chapter.read_text(encoding="utf-8") if chapter.exists() else ""
    section = text.partition(f'<a id="{task.guide}"></a>')[2].partition('<a id="')[0]
    listed = section.partition("**Traps.**")[2].partition("\n**")[0]
    return [" ".join(title.split()).rstrip(".,:") for title in re.findall(r"^- \*(.+?)\*", listed, re.MULTILINE | re.DOTALL)]


def errors(room: Classroom, task: Task) -> list[str]:
    """What the docstrings of a task's functions say that they raise, as ``function: Error``."""
    found = []
    for target in task.targets:
        node = find_function(parse(room.reference(target.file)), target.name) if is_python(target.file) else None
        raises = (ast.get_docstring(node) or "").partition("Raises:\n")[2] if node else ""
        found += [f"{target.name}: {error}" for error in re.findall(r"\b([A-Z]\w*Error):", raises)]
    return found
