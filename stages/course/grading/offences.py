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
MACHINERY = ("atexit", "builtins", "ctypes", "gc", "importlib", "inspect", "marshal", "posix", "pluggy", "unittest")
"""Modules by which code gets at other code while it runs, or out of the process."""
DOORS = {
    "sys": {
        "modules", "_getframe", "_current_frames", "settrace", "setprofile", "monitoring", "meta_path", "path", "path_hooks",
        "addaudithook", "excepthook", "unraisablehook",
    },
    "os": {"_exit", "environ", "getenv", "environb", "fork", "forkpty"},
    "signal": {"signal", "setitimer", "alarm"},
    "threading": {"Thread", "Timer", "settrace", "setprofile", "settrace_all_threads", "setprofile_all_threads"},
    "_thread": {"start_new_thread"},
    "traceback": {"walk_stack"},
}  # fmt: skip
"""Module → its names that lead to the tests, to where results are written, out of the process, or into another's turn."""
MAKERS = {"exec", "eval", "compile"}
"""What makes code from text."""
INSIDES = {
    "__builtins__", "__closure__", "__code__", "__globals__", "__self__", "__subclasses__", "f_back", "f_globals", "f_locals",
    "ag_frame", "cr_frame", "gi_frame", "tb_frame",
}  # fmt: skip
"""Attributes that lead from one function into another."""
COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
"""What a test asks a value; an answer may not give itself."""


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
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules_of = {each.name.split(".")[0]: each.name.split(".")[0] for each in imports if each.asname is None}
    modules_of |= {each.asname: each.name for each in imports if each.asname is not None}
    found = [(what, node.lineno) for node in ast.walk(tree) for what in _reaches(node, modules_of)]
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
            elif module.split(".")[0] in (*TOOLS, *MACHINERY):
                found.append((f"imports {module}", node.lineno))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            if REFERENCE.search(node.value):
                found.append((f"names the reference: {node.value[:80]!r}", node.lineno))
            elif VARIABLES.search(node.value):
                found.append((f"names a variable of the grader: {node.value[:80]!r}", node.lineno))
            elif node.value in INSIDES | COMPARISONS:
                found.append((f"names {node.value}", node.lineno))
    return found


def _reaches(node: ast.AST, modules: dict[str, str]) -> list[str]:
    """What a piece of code does to get at the tests or at what judges them.

    Args:
        modules: name in the file → the module that it was imported as.
    """
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"uses {node.module}.{each.name}" for each in node.names if each.name in DOORS.get(node.module or "", ())]
    if isinstance(node, ast.Attribute):
        door = DOORS.get(modules.get(node.value.id, ""), set()) if isinstance(node.value, ast.Name) else set()
        written = f"changes {modules[node.value.id]}.{node.attr}" if _is_module(node.value, modules) else ""
        changes = [written] if written and not isinstance(node.ctx, ast.Load) else []
        uses = [f"uses {ast.unparse(node)}"] if node.attr in door else []
        return changes + uses + ([f"uses {node.attr}"] if node.attr in INSIDES else [])
    if isinstance(node, ast.Name):
        return [f"uses {node.id}"] if node.id in INSIDES | MAKERS else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args and _is_module(node.args[0], modules):
        name = modules[node.args[0].id]
        if node.func.id in ("setattr", "delattr"):
            return [f"changes {name}"]
        return [f"uses the names of {name}"] if node.func.id == "vars" else []
    if isinstance(node, ast.ClassDef):
        targets = [target for each in node.body if isinstance(each, ast.Assign) for target in each.targets]
        names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
        names += [target.id for target in targets if isinstance(target, ast.Name)]
        return [f"defines {name}" for name in names if name in COMPARISONS]
    return []


def _is_module(node: ast.expr, modules: dict[str, str]) -> bool:
    return isinstance(node, ast.Name) and node.id in modules
