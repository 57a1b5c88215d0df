"""Reads a stage's files without running them: what is still to do, and what would end in a stack dump if it ran."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

from stages.course.tools.catalog import ROOT, Stage, Target, Task
from stages.course.tools.targets import Function, find_function, find_lines, is_python, parse


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a learner has to mend first.

    Attributes:
        file: path from the repository's root. line: 1-based, 0 if there is none to point at.
        message: what is wrong and what to do.
        tasks: ids of the tasks that it concerns.
    """

    file: str
    line: int
    message: str
    tasks: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}{f', line {self.line}' if self.line else ''}: {self.message}"


@dataclass(slots=True)
class Inspection:
    """What a look at a stage's files gives.

    Attributes:
        lines: target → line of its definition.
        todo: targets whose body is still the placeholder.
        problems: in the order of the files.
    """

    lines: dict[Target, int] = field(default_factory=dict)
    todo: set[Target] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def open_targets(self, task: Task) -> list[Target]:
        """The functions of a task that are not written yet."""
        return [target for target in task.targets if target in self.todo]


def inspect_stage(stage: Stage) -> Inspection:
    """Look at all files of a stage."""
    result = Inspection()
    for file in stage.files:
        _inspect_file(stage, file, result)
    return result


def _inspect_file(stage: Stage, file: str, result: Inspection) -> None:
    path = stage.path / file
    name = str(path.relative_to(ROOT))
    tasks = [task for task in stage.tasks if any(target.file == file for target in task.targets)]
    ids = tuple(task.id for task in tasks)
    if not path.exists():
        result.problems.append(Problem(name, 0, f"the file is gone; make reset TASK={ids[0]} brings it back", ids))
        return
    try:
        text = path.read_text(encoding="utf-8")
        if not is_python(file):
            _inspect_marked(stage, file, text, result)
            return
        tree = parse(text)
    except SyntaxError as error:
        mark = f"\n    {error.text.rstrip()}\n    {' ' * ((error.offset or 1) - 1)}^" if error.text else ""
        result.problems.append(Problem(name, error.lineno or 0, f"Python cannot read this: {error.msg}{mark}", ids))
        return
    except UnicodeDecodeError:
        result.problems.append(Problem(name, 0, "the file is not UTF-8 text; save it as UTF-8", ids))
        return
    for line in imports_of_the_reference(tree):
        message = (
            "imports `solutions`, the code that this file stands in for; write it yourself, and import with dots (from ..x)"
        )
        result.problems.append(Problem(name, line, message, ids))
    reference = parse(stage.reference(file))
    for task in tasks:
        for target in task.targets:
            if target.file == file:
                _inspect_target(task, target, name, find_function(tree, target.name), reference, result)


def _inspect_marked(stage: Stage, file: str, text: str, result: Inspection) -> None:
    """Look at the marked parts of a file that is not Python; what is between them the compiler will tell."""
    for task in stage.tasks:
        for target in task.targets:
            if target.file != file:
                continue
            place = find_lines(text, file, target.name)
            if place is None:
                message = f"the markers of {target.name} are gone; make reset-stage-{stage.number} brings them back"
                result.problems.append(Problem(relative(stage.path / file), 0, message, (task.id,)))
                continue
            result.lines[target] = place.start + 1
            if any(line.startswith(f'#error "{task.marker}') for line in text.splitlines()[place]):
                result.todo.add(target)


def _inspect_target(
    task: Task, target: Target, name: str, node: Function | None, reference: ast.Module, result: Inspection
) -> None:
    if node is None:
        message = f"{target.name} is gone, and its tests call it; make reset TASK={task.id} brings the function back"
        result.problems.append(Problem(name, 0, message, (task.id,)))
        return
    result.lines[target] = node.lineno
    if any(task.marker in ast.unparse(statement) for statement in node.body if isinstance(statement, ast.Raise)):
        result.todo.add(target)
    expected = signature(find_function(reference, target.name))
    if signature(node) != expected:
        message = (
            f"the signature of {target.name} has changed, and others call it\n"
            f"    expected  def {node.name}({expected})\n    yours     def {node.name}({signature(node)})"
        )
        result.problems.append(Problem(name, node.lineno, message, (task.id,)))


def signature(node: Function) -> str:
    """Names, order and defaults of a function's parameters; annotations are nobody's business but the reader's."""
    arguments = parse(ast.unparse(node)).body[0].args  # a copy to take the annotations from
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def imports_of_the_reference(tree: ast.Module) -> list[int]:
    """Lines that import `solutions` by name."""
    lines = []
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or ""]
        if any(module.split(".")[0] == "solutions" for module in modules):
            lines.append(node.lineno)
    return lines


def relative(path: str | Path) -> str:
    """A path as a person at the repository's root would write it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
