"""Finds code in a learner's file that uses the reference in its place, or reaches for the tests and the grader."""

from __future__ import annotations

import ast
import re

from stages.course.tools.targets import is_python, parse

REFERENCE = re.compile(r"(^|[^\w])solutions([./\\]|$)")
"""A module's name or a path inside the reference; the bare word too, which a path may be put together from."""
TOOLS = ("pytest", "_pytest", "hypothesis", "stages")
"""What a starter has no business with: it imports its engine with dots."""
VARIABLES = re.compile(r"COURSE_RESULTS|GRADING_\w+")


def offences(text: str, file: str, starter: str) -> list[str]:
    """What a file does that it must not, each with its line; what the starter does too is allowed.

    Args:
        file: path inside `solutions/`; it tells the language.
    """
    find = _in_python if is_python(file) else _in_kernel
    allowed = {what for what, _ in find(starter)}
    return [f"line {line}: it {what}" for what, line in find(text) if what not in allowed]


def uses_the_reference(offence: str) -> bool:
    """Whether an offence is about the reference, and not about the tests."""
    return "the reference" in offence


def _in_kernel(text: str) -> list[tuple[str, int]]:
    return [
        (f"names the reference: {line.strip()[:80]}", number)
        for number, line in enumerate(text.splitlines(), 1)
        if REFERENCE.search(line.split("//")[0])
    ]


def _in_python(text: str) -> list[tuple[str, int]]:
    """Pairs of an offence and its line. A file that Python cannot read commits none."""
    try:
        tree = parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""] if node.level == 0 else []
            inside = (node.module or "").split(".")[0]
            if node.level > 1 and inside in ("course", "conftest", "tests"):
                found.append((f"imports the course's {inside}", node.lineno))
        else:
            modules = []
        for module in modules:
            if module.split(".")[0] == "solutions":
                found.append((f"imports the reference: {module}", node.lineno))
            elif module.split(".")[0] in TOOLS:
                found.append((f"imports {module}", node.lineno))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            if REFERENCE.search(node.value):
                found.append((f"names the reference: {node.value[:80]!r}", node.lineno))
            elif VARIABLES.search(node.value):
                found.append((f"names a variable of the grader: {node.value[:80]!r}", node.lineno))
    return found
