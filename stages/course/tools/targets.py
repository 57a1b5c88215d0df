"""Where the functions that learners write stand in a file: in Python by their definition, in CUDA between two markers.

The markers are comments, ``// TASK 4.8 begin: name`` and ``// TASK 4.8 end``, around the part of a function that is left out.
"""

from __future__ import annotations

import ast
import re
import textwrap
import threading

from stages.course.tools.catalog import CourseError, Task

WIDTH = 120
LONGEST_LINE = 128
"""What `ruff format` breaks lines at."""

_parsing = threading.Lock()


def parse(text: str) -> ast.Module:
    """`ast.parse`, one thread at a time: Python 3.11 counts the depth of all threads' trees together, and complains
    (python/cpython#106905).

    Raises:
        SyntaxError: Python cannot read the text.
    """
    with _parsing:
        return ast.parse(text)


def is_python(file: str) -> bool:
    """Whether a task's file is Python; else it is CUDA."""
    return file.endswith(".py")


Function = ast.FunctionDef | ast.AsyncFunctionDef


def find_function(tree: ast.Module, name: str) -> Function | None:
    """The definition of ``function`` or ``Class.function`` in a module, or None."""
    body: list[ast.stmt] = tree.body
    *outer, last = name.split(".")
    for part in outer:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == part), [])
    return next((node for node in body if isinstance(node, Function) and node.name == last), None)


def find_lines(text: str, file: str, name: str) -> slice | None:
    """Which lines are a function's, decorators included, or a marked part's, markers included; None when it is not there.

    Raises:
        SyntaxError: Python cannot read the text.
    """
    if not is_python(file):
        return _marked_lines(text, name)
    node = find_function(parse(text), name)
    if node is None:
        return None
    return slice(min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1, node.end_lineno)


def function_source(text: str, file: str, name: str) -> str:
    """A function's own lines, or nothing when it is not there."""
    lines = find_lines(text, file, name)
    return "" if lines is None else "\n".join(text.splitlines()[lines])


def _marked_lines(text: str, name: str) -> slice | None:
    lines = text.splitlines()
    begin = re.compile(rf"\s*// TASK \d+\.\d+ begin: {re.escape(name)}\s*")
    first = next((number for number, line in enumerate(lines) if begin.fullmatch(line)), None)
    if first is None:
        return None
    end = re.compile(r"\s*// TASK \d+\.\d+ end\s*")
    last = next((number for number in range(first, len(lines)) if end.fullmatch(lines[number])), None)
    return None if last is None else slice(first, last + 1)


def emptied(text: str, file: str, task: Task, name: str, hint: str | None) -> tuple[slice, list[str]]:
    """What a starter has in a function's place: which lines go, and those that come instead.

    Args:
        hint: what a comment says there; None: no comment.

    Raises:
        CourseError: the function is not there, or has no docstring to stand on.
    """
    message = f"{task.marker} {name}, see {task.section}"
    if not is_python(file):
        lines = _marked_lines(text, name)
        if lines is None:
            raise CourseError(f"task {task.id}: there are no markers for {name} in solutions/{file}")
        begin = text.splitlines()[lines.start]
        indent = begin[: len(begin) - len(begin.lstrip())]
        return slice(lines.start + 1, lines.stop - 1), [*_comment(hint, indent, "//"), f'#error "{message}"']
    node = find_function(parse(text), name)
    if node is None:
        raise CourseError(f"task {task.id}: there is no {name} in solutions/{file}")
    if ast.get_docstring(node) is None:
        raise CourseError(f"task {task.id}: {name} in solutions/{file} has no docstring")
    indent = " " * node.body[0].col_offset
    statement = [f'{indent}raise NotImplementedError("{message}")']
    if len(statement[0]) > LONGEST_LINE:
        statement = [f"{indent}raise NotImplementedError(", f'{indent}    "{message}"', f"{indent})"]
    if _is_async_generator(node):
        statement.append(f"{indent}yield  # which makes it a generator; keep a yield")
    return slice(node.body[0].end_lineno, node.end_lineno), [*_comment(hint, indent, "#"), *statement]


def _is_async_generator(node: Function) -> bool:
    """Whether callers say ``async for``, which asks for a generator before it runs any of it."""
    return isinstance(node, ast.AsyncFunctionDef) and any(isinstance(part, ast.Yield) for part in ast.walk(node))


def _comment(hint: str | None, indent: str, sign: str) -> list[str]:
    if hint is None:
        return []
    width = WIDTH - len(indent) - len(sign) - 1
    return [f"{indent}{sign} {line}" for line in textwrap.wrap(f"Hint: {hint}", width)]
