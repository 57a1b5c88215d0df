"""The arrays of a step are declared once: whoever carries them inherits them."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "solutions"


def fields_of(node: ast.ClassDef) -> set[str]:
    return {each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)}


def test_one_class_declares_the_arrays_of_a_step() -> None:
    declaring = [
        f"{path.relative_to(ROOT).as_posix()}:{node.name}"
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and {"slot_mapping", "query_start_loc"} <= fields_of(node)
    ]
    assert declaring == ["batching/step_arrays.py:PagedArrays"]
