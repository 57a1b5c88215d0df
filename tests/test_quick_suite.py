"""`make test` leaves out what is marked slow, and yet looks at every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .times import seconds_by_file, times_table

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("solutions/tests", "tests") for path in (ROOT / folder).glob("test_*.py"))
LEFT_OUT = {"slow", "parity"}
INSTEAD = {
    "test_tool_calls": "test_tool_parsers", "test_packaged_models": "test_embeddings",
    "test_real_gemma": "test_families",
    "test_real_faults": "test_server_limits", "test_side_by_side": "test_quick_suite",
    "test_streaming": "test_api_server", "test_kv_tier_servers": "test_kv_tiers",
}  # fmt: skip
"""Files all of whose tests are slow, and another one that looks at the same code quickly."""


def marks(decorators: list[ast.expr]) -> set[str]:
    """Names of the ``pytest.mark`` decorators."""
    names = (ast.unparse(each).removeprefix("pytest.mark.") for each in decorators if "pytest.mark." in ast.unparse(each))
    return {name.split("(")[0] for name in names}


def quick_tests(source: str) -> list[str]:
    """Tests of a file that `make test` runs; a file that is left out as a whole has none."""
    tree = ast.parse(source)
    whole = [node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    if any(f"mark.{mark}" in ast.unparse(node.value) for node in whole for mark in LEFT_OUT):
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    cases = [node.name for node in functions if node.name.startswith("test_") and not marks(node.decorator_list) & LEFT_OUT]
    return cases + [
        node.targets[0].id for node in tree.body if isinstance(node, ast.Assign) and ".TestCase" in ast.unparse(node)
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_a_quick_test(path: Path) -> None:
    quick = quick_tests(path.read_text(encoding="utf-8"))
    assert bool(quick) != (path.stem in INSTEAD), quick


def test_what_looks_instead_is_quick() -> None:
    quick = {path.stem for path in FILES} - INSTEAD.keys()
    assert set(INSTEAD.values()) <= quick


def test_a_file_of_slow_tests_is_noticed() -> None:
    slow = "import pytest\n@pytest.mark.slow\n@pytest.mark.parametrize('n', [1])\ndef test_a(n): pass\n"
    assert quick_tests(slow) == []
    assert quick_tests(slow + "def test_b(): pass\n") == ["test_b"]
    assert quick_tests("import pytest\npytestmark = pytest.mark.slow\ndef test_c(): pass\n") == []


def is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Set | ast.SetComp) or (
        isinstance(node, ast.Call) and ast.unparse(node.func) in ("set", "frozenset")
    )


def unordered_cases(source: str) -> list[str]:
    """What names tests, or lists them, in an order that two processes need not share."""
    tree = ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    constants = {
        name.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for name in node.targets
        if isinstance(name, ast.Name)
    }
    found = []
    for call in (each for each in calls if ast.unparse(each.func) == "pytest.mark.parametrize"):
        named = any(keyword.arg == "ids" for keyword in call.keywords)
        cases = [constants.get(node.id, node) if isinstance(node, ast.Name) else node for node in call.args[1:]]
        looked = [node for case in cases for node in (ast.walk(case) if named else [case])]
        found += [ast.unparse(node) for node in looked if is_set(node)]
    return found


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("stages/*/tests/test_*.py"))], ids=lambda path: path.stem)
def test_all_processes_collect_the_same_tests(path: Path) -> None:
    """pytest-xdist stops where they differ: a set prints in one order from source and in another from a cached file."""
    assert unordered_cases(path.read_text(encoding="utf-8")) == []


def test_a_set_that_names_tests_is_noticed() -> None:
    case = "@pytest.mark.parametrize('n', [{1, 2}], ids=str)\ndef test_a(n): pass\n"
    assert unordered_cases(case) == ["{1, 2}"]
    assert unordered_cases(case.replace(", ids=str", "")) == []
    for cases in ("{1, 2}", "set([1, 2])", "frozenset((1, 2))", "{n for n in (1, 2)}"):
        assert unordered_cases(f"@pytest.mark.parametrize('n', {cases})\ndef test_a(n): pass\n") != []
        assert unordered_cases(f"ALL = {cases}\n@pytest.mark.parametrize('n', ALL)\ndef test_a(n): pass\n") != []
        assert unordered_cases(f"@pytest.mark.parametrize('n', sorted({cases}))\ndef test_a(n): pass\n") == []


def test_the_table_of_times_adds_up(tmp_path: Path) -> None:
    cases = [("a.test_x.TestCase", 0.25), ("a.test_x", 0.5), ("tests.test_y", 4.0)]
    lines = "".join(f'<testcase classname="{name}" name="n" time="{seconds}"/>' for name, seconds in cases)
    (tmp_path / "times.xml").write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    files = seconds_by_file(tmp_path / "times.xml")
    assert files == {"tests/test_y.py": [4.0], "a/test_x.py": [0.25, 0.5]}
    assert times_table(files).splitlines()[2:] == ["| tests/test_y.py | 1 | 4 |", "| a/test_x.py | 2 | 1 |", "| all | 3 | 5 |"]
