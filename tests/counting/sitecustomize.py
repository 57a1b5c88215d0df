"""Notes which functions are called, in every process of a program: Python imports this file first, as it lies on PYTHONPATH.

CALLS_ROOT is the package's folder, CALLS_OF a JSON list of functions as ``file:qualified name``; the first call of each in a
process appends its name to the file CALLS_FILE. Such a function gets one more statement when its module is compiled; all else
runs as ever, so nothing is slower and no object is another one.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

WANTED: dict[str, dict[str, str]] = {}
"""Path → qualified name → what is noted."""
for function in json.loads(os.environ["CALLS_OF"]):
    file, _, name = function.partition(":")
    WANTED.setdefault(f"{os.environ['CALLS_ROOT']}/{file}", {})[name] = function
noted: set[str] = set()


def note(function: str) -> None:
    """Write a function's name down, once."""
    if function not in noted:
        noted.add(function)
        with Path(os.environ["CALLS_FILE"]).open("a") as file:
            file.write(function + "\n")


def mark(body: list[ast.stmt], prefix: str, names: dict[str, str]) -> None:
    """Let the functions of these names begin with a call of `note`, behind their docstrings."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            mark(node.body, f"{prefix}{node.name}.", names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and prefix + node.name in names:
            call = ast.parse(f"_note_call({names[prefix + node.name]!r})").body[0]
            for part in ast.walk(call):
                ast.copy_location(part, node.body[0])
            node.body.insert(int(ast.get_docstring(node) is not None), call)


plain = SourceFileLoader.get_code


def get_code(self: SourceFileLoader, fullname: str) -> CodeType | None:
    path = self.get_filename(fullname)
    if path not in WANTED:
        return plain(self, fullname)
    tree = ast.parse(self.get_data(path))
    mark(tree.body, "", WANTED[path])
    return compile(tree, path, "exec", dont_inherit=True)


builtins._note_call = note
SourceFileLoader.get_code = get_code
