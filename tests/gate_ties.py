"""The rule of the gate that joins what the course promises to the mutants that show it to be tested. See `tests/gate.py`."""

from __future__ import annotations

import ast
import re

from stages.course.tools.catalog import Stage, Task
from stages.course.tools.targets import find_function, is_python, parse
from stages.course.tools.wrong_versions import load_mutants
from tests.classroom import Classroom

SOURCE = re.compile(r"\([^()]*(?:(?:19|20)\d\d|§)[^()]*\)|[^.(]*, (?:19|20)\d\d[,)]|§\d+(?:\.\d+)?")
"""A source in parentheses or at the beginning of a sentence."""
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?![\w-])")


def promises_are_tied(room: Classroom, stage: Stage) -> list[str]:
    """Each trap of the guide, and each error and number that a docstring promises, stands in the `ties` of a mutant, and each
    tie names one."""
    ties = {tie for mutant in load_mutants(room.root, stage) for tie in mutant.ties}
    bank, complaints, known = f"tests/mutants/stage{stage.number}.toml", [], set()
    for task in stage.tasks:
        found = [*traps(room, stage, task), *errors(room, task), *numbers(room, task)]
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
    for name, text in docstrings(room, task):
        raises = text.partition("Raises:\n")[2]
        found += [f"{name}: {error}" for error in re.findall(r"\b([A-Z]\w*Error):", raises)]
    return found


def numbers(room: Classroom, task: Task) -> list[str]:
    """The numbers from 3 on, and fractions, in the docstrings of a task's functions, as ``function: number``, each once. What
    is in the parentheses of a source, with a year or a section, promises nothing."""
    found = []
    for name, text in docstrings(room, task):
        said = SOURCE.sub("", text)
        found += [f"{name}: {number}" for number in NUMBER.findall(said) if float(number) not in (0, 1, 2)]
    return list(dict.fromkeys(found))


def docstrings(room: Classroom, task: Task) -> list[tuple[str, str]]:
    """A task's functions in Python, each with its docstring."""
    found = []
    for target in task.targets:
        node = find_function(parse(room.reference(target.file)), target.name) if is_python(target.file) else None
        found.append((target.name, (ast.get_docstring(node) or "") if node else ""))
    return found
